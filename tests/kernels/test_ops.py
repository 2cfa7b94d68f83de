# SPDX-License-Identifier: Apache-2.0
"""linear, and what every op owes torch: schemas, fake kernels, compilation, threads and the
choice of the path."""

import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch

from smoothrot_vllm import ops, reference
from smoothrot_vllm.errors import ConfigError, UnsupportedPlatformError


@dataclass(frozen=True)
class Layer:
    """Of random weights, four bits each."""

    weight: torch.Tensor
    scale: torch.Tensor
    group_scale: torch.Tensor | None
    packed: torch.Tensor
    group_size: int


def layer(columns: int, inputs: int, group_size: int = -1) -> Layer:
    weight = reference.encode(torch.randint(-8, 8, (columns, inputs), dtype=torch.int8), 4)
    scale, group_scale = torch.rand(columns, 1) * 0.01, None
    if group_size != -1:
        group_scale = torch.randint(1, 16, (columns, inputs // group_size), dtype=torch.uint8)
    packed = ops.prepack_weight(weight, scale, group_scale, 4)
    return Layer(weight, scale, group_scale, packed, group_size)


WIDTHS = [
    (576, 0, -1),
    (1536, 1536, -1),
    (1536, 768, 128),
    (576, 0, 64),  # an odd number of groups
    (608, 0, 32),  # another
    (2144, 0, 32),  # another, and a part of the 2048 inputs that are expanded at a time
    (26, 0, -1),
    (24, 12, -1),
]
TOKENS = (1, 3, 19, 29)
"""One row, one tile, several tiles: each takes another way through the threads. 19 on AVX2 and 29
on AVX-512 are as many tiles as from which weights are expanded to bytes."""


@pytest.mark.parametrize(("inputs", "block", "group_size"), WIDTHS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("act_bits", [4, 8])
def test_linear_is_the_reference_of_quant_then_gemm(
    isa: str, inputs: int, block: int, group_size: int, dtype: torch.dtype, act_bits: int
) -> None:
    own = layer(45, inputs, group_size)
    bias = torch.randn(45).to(dtype)
    x = torch.randn(max(TOKENS), inputs).to(dtype)
    codes, scale = (
        ops.hadamard_quant(x, block, 0.9, act_bits) if block else ops.quant(x, 0.9, act_bits)
    )
    weights = (own.weight, own.scale, own.group_scale)
    expected = reference.gemm(codes, scale, *weights, bias, dtype, act_bits, 4)
    numbers = (block, 0.9, act_bits, 4, group_size)
    for tokens in TOKENS:
        y = ops.linear(x[:tokens], own.packed, own.scale, bias, *numbers)
        assert torch.equal(y, expected[:tokens]), isa


@pytest.mark.parametrize(("inputs", "block", "group_size"), WIDTHS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_silu_mul_linear_is_silu_mul_hadamard_quant_then_gemm(
    isa: str, inputs: int, block: int, group_size: int, dtype: torch.dtype
) -> None:
    own = layer(45, inputs, group_size)
    bias = torch.randn(45).to(dtype)
    gate_up = torch.randn(max(TOKENS), 2 * inputs).to(dtype)
    codes, scale = ops.silu_mul_hadamard_quant(gate_up, block, 0.9, 8)
    weights = (own.weight, own.scale, own.group_scale)
    expected = reference.gemm(codes, scale, *weights, bias, dtype, 8, 4)
    numbers = (block, 0.9, 8, 4, group_size)
    for tokens in TOKENS:
        y = ops.silu_mul_linear(gate_up[None, :tokens], own.packed, own.scale, bias, *numbers)
        assert torch.equal(y, expected[None, :tokens]), isa


@pytest.mark.parametrize("shape", [(64,), (3, 64), (2, 3, 64), (0, 64), (2, 0, 64)])
def test_linear_keeps_leading_dimensions(shape: tuple[int, ...]) -> None:
    own = layer(33, 64)
    x = torch.randn(shape)
    y = ops.linear(x, own.packed, own.scale, None, 0, 1.0, 8, 4, -1)
    assert y.shape == (*shape[:-1], 33)
    flat = ops.linear(x.reshape(-1, 64), own.packed, own.scale, None, 0, 1.0, 8, 4, -1)
    assert torch.equal(y.reshape(-1, 33), flat)


def test_a_token_that_is_not_finite_gives_nan_and_spares_the_others() -> None:
    own = layer(33, 64)
    x = torch.randn(3, 64)
    clean = ops.linear(x, own.packed, own.scale, None, 64, 1.0, 8, 4, -1)
    x[1, 7] = float("inf")
    y = ops.linear(x, own.packed, own.scale, None, 64, 1.0, 8, 4, -1)
    assert y[1].isnan().all()
    assert torch.equal(y[[0, 2]], clean[[0, 2]])


@pytest.mark.parametrize(
    ("x", "block", "message"),
    [
        (
            torch.randn(2, 64, dtype=torch.float64),
            0,
            "x: expected float32, bfloat16 or float16, got float64",
        ),
        (torch.randn(64, 2).T, 0, "x: expected a contiguous .* not contiguous"),
        (torch.randn(2, 66), 0, "packed: expected contiguous uint8"),
        (torch.randn(2, 64), 128, "block: expected a divisor of 64, got 128"),
        (torch.randn(2, 64), -64, "Hadamard block -64"),
    ],
)
def test_linear_names_a_wrong_argument(x: torch.Tensor, block: int, message: str) -> None:
    own = layer(33, 64)
    with pytest.raises(ConfigError, match=message):
        ops.linear(x, own.packed, own.scale, None, block, 1.0, 8, 4, -1)


@pytest.mark.parametrize(
    ("gate_up", "block", "message"),
    [
        (torch.randn(2, 128, dtype=torch.float64), 0, "gate_up: expected .*got .*float64"),
        (torch.randn(2, 130).T, 0, "gate_up: expected a contiguous"),
        (torch.randn(2, 130), 0, "gate_up: expected 2 x an even number of columns"),
        (torch.randn(2, 128), 128, "block: expected a divisor of 64, got 128"),
    ],
)
def test_silu_mul_hadamard_quant_names_a_wrong_argument(
    gate_up: torch.Tensor, block: int, message: str
) -> None:
    with pytest.raises(ConfigError, match=f"silu_mul_hadamard_quant: {message}"):
        ops.silu_mul_hadamard_quant(gate_up, block, 0.9, 8)
    own = layer(33, 64)
    with pytest.raises(ConfigError, match=f"silu_mul_linear: {message}"):
        ops.silu_mul_linear(gate_up, own.packed, own.scale, None, block, 0.9, 8, 4, -1)


def opcheck_cases() -> Iterator[tuple[str, tuple[object, ...]]]:
    ops.prepare_rotation(64)
    x = torch.randn(3, 64).bfloat16()
    for bits in (4, 8):
        yield "quant", (x, 0.9, bits)
        yield "hadamard_quant", (x, 64, 0.9, bits)
        yield "silu_mul_hadamard_quant", (torch.randn(3, 128), 64, 0.9, bits)
        norm = (torch.ones(64).bfloat16(), 1e-6, 0.9, bits, torch.randn(3, 64).bfloat16())
        yield "rms_norm_quant", (x, *norm)
        codes, scale = reference.quant(x, 0.9, bits)
        for group_size in (-1, 32, 64):
            own, numbers = layer(40, 64, group_size), (0.9, bits, 4, group_size)
            weights = (own.packed, own.scale)
            yield "gemm", (codes, scale, *weights, None, torch.float16, *numbers[1:])
            yield "linear", (x, *weights, torch.randn(40), 64, *numbers)
            yield "linear", (x.reshape(1, 3, 64), *weights, None, 0, *numbers)
            gate_up = torch.randn(1, 3, 128)
            yield "silu_mul_linear", (gate_up, *weights, torch.randn(40), 64, *numbers)
    yield "prepack_weight", (torch.zeros(40, 36, dtype=torch.int8), torch.ones(40, 1), None, 8)
    # Where the group scales fill a line of 64 bytes, half of one, and more than one.
    for inputs, group_size in ((128, 32), (128, 64), (160, 32), (96, -1)):
        own = layer(40, inputs, group_size)
        yield "prepack_weight", (own.weight, own.scale, own.group_scale, 4)


def test_opcheck_accepts_every_op() -> None:
    for name, arguments in opcheck_cases():
        torch.library.opcheck(getattr(torch.ops.smoothrot, name).default, arguments)


def test_linear_compiles_to_one_graph_for_any_number_of_tokens() -> None:
    own = layer(45, 48)

    def forward(x: torch.Tensor) -> torch.Tensor:
        return torch.relu(ops.linear(x, own.packed, own.scale, None, 48, 0.9, 8, 4, -1))

    compiled = torch.compile(forward, fullgraph=True, dynamic=True, backend="aot_eager")
    for tokens in (2, 5):
        x = torch.randn(tokens, 48)
        assert torch.equal(compiled(x), forward(x))


def test_results_do_not_depend_on_the_number_of_threads() -> None:
    own = layer(500, 1536, 128)
    x = torch.randn(70, 1536).bfloat16()
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            results.append(ops.linear(x, own.packed, own.scale, None, 1536, 0.9, 4, 4, 128))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def kernel_in_new_process(isa: str) -> subprocess.CompletedProcess[str]:
    code = "from smoothrot_vllm import ops; print(ops.kernel_name())"
    environment = os.environ | {"SMOOTHROT_CPU_ISA": isa}
    return subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
    )


def test_the_environment_forces_a_path() -> None:
    done = kernel_in_new_process("portable")
    assert done.stdout.strip() == "portable", done.stderr


def test_the_environment_refuses_an_unknown_path() -> None:
    done = kernel_in_new_process("sse9")
    assert done.returncode != 0
    assert "UnsupportedPlatformError: SMOOTHROT_CPU_ISA: expected one of" in done.stderr
    assert "got 'sse9'" in done.stderr


def test_select_kernel_refuses_an_unknown_path_and_keeps_the_current_one() -> None:
    before = ops.kernel_name()
    with pytest.raises(UnsupportedPlatformError, match=r"expected one of .*portable, got 'mmx'"):
        ops.select_kernel("mmx")
    assert ops.kernel_name() == before


def test_the_chosen_path_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    ops._log_kernel.cache_clear()
    with caplog.at_level(logging.INFO, logger="smoothrot_vllm"):
        ops.kernel_name()
        ops.kernel_name()
    assert [record.getMessage().split(",")[0] for record in caplog.records] == [
        f"SmoothRot CPU kernels: {ops.kernel_name()}"
    ]
