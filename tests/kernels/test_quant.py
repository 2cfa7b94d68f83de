# SPDX-License-Identifier: Apache-2.0
"""quant and the ops that rotate, gate or norm before it give the reference's codes and scales
bit for bit, on every path."""

import math
from typing import Any

import pytest
import torch
from awkward_rows import awkward_rows

from smoothrot_vllm import ops, reference
from smoothrot_vllm.errors import ConfigError

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
MODEL_SIZES = [576, 896, 1536, 2048, 3584, 4096, 4864, 8192, 11008, 14336, 18944]
POWERS = [
    (8, 1),
    (6, 2),
    (8, 4),
    (8, 8),
    (16, 16),
    (32, 32),
    (64, 64),
    (256, 128),
    (1024, 512),
    (32768, 32768),
]
SHORT_RUNS = [(12, 12), (24, 24), (40, 20), (80, 80), (72, 36), (344, 172), (296, 148), (504, 252)]
WHOLE_RUNS = [
    (48, 48),
    (192, 192),
    (448, 224),
    (768, 768),
    (1376, 1376),
    (1216, 1216),
    (12288, 12288),
]
BLOCKS = [
    (240, 48),
    (1376, 344),
    (1536, 768),
    (1728, 576),
    (11008, 2752),
    (14336, 3584),
    (18944, 2368),
]

pytestmark = pytest.mark.usefixtures("isa")


def assert_same(
    got: tuple[torch.Tensor, torch.Tensor], expected: tuple[torch.Tensor, torch.Tensor]
) -> None:
    torch.testing.assert_close(got[0], expected[0], rtol=0, atol=0)
    torch.testing.assert_close(got[1], expected[1], rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("size", [2, 14, 26, 64, 130, 576, 2050])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("dtype", DTYPES)
def test_quant_equals_the_reference(size: int, bits: int, dtype: torch.dtype) -> None:
    x = awkward_rows(size, dtype)
    for clip in (1.0, 0.9, 1e-9):
        assert_same(ops.quant(x, clip, bits), reference.quant(x, clip, bits))


@pytest.mark.parametrize("size", MODEL_SIZES)
def test_hadamard_quant_equals_the_reference_at_every_model_size(size: int) -> None:
    for dtype in DTYPES:
        x = torch.randn(2, size).to(dtype)
        assert_same(ops.hadamard_quant(x, size, 0.9, 4), reference.hadamard_quant(x, size, 0.9, 4))


@pytest.mark.parametrize(("size", "block"), [*POWERS, *SHORT_RUNS, *WHOLE_RUNS, *BLOCKS])
@pytest.mark.parametrize("bits", [4, 8])
def test_hadamard_quant_equals_the_reference_on_blocks(size: int, block: int, bits: int) -> None:
    x = torch.randn(3, size)
    assert_same(
        ops.hadamard_quant(x, block, 0.9, bits), reference.hadamard_quant(x, block, 0.9, bits)
    )


@pytest.mark.parametrize("block", [64, 1536])
@pytest.mark.parametrize("dtype", DTYPES)
def test_hadamard_quant_treats_awkward_rows_as_the_reference_does(
    block: int, dtype: torch.dtype
) -> None:
    x = awkward_rows(1536, dtype)
    for bits in (4, 8):
        assert_same(
            ops.hadamard_quant(x, block, 1.0, bits), reference.hadamard_quant(x, block, 1.0, bits)
        )


def test_no_tokens_give_empty_codes() -> None:
    codes, scale = ops.quant(torch.empty(0, 64), 1.0, 4)
    assert codes.shape == (0, 32)
    assert scale.shape == (0,)


@pytest.mark.parametrize(
    ("x", "block", "clip", "bits", "message"),
    [
        (
            torch.randn(2, 8, dtype=torch.float64),
            0,
            1.0,
            4,
            "x: expected float32, bfloat16 or float16, got float64",
        ),
        (torch.randn(2, 7), 0, 1.0, 4, "x: expected an even number of inputs, got 7"),
        (
            torch.randn(8),
            0,
            1.0,
            4,
            r"x: expected a contiguous \(tokens, inputs\) tensor on the CPU, got float32 \(8\)",
        ),
        (
            torch.randn(8, 2).T,
            0,
            1.0,
            4,
            r"x: expected a contiguous .* got float32 \(2, 8\), not contiguous",
        ),
        (torch.randn(2, 8), 0, 0.0, 4, "clip: expected 0 < clip <= 1, got 0"),
        (torch.randn(2, 8), 0, 1.5, 4, "clip: expected 0 < clip <= 1, got 1.5"),
        (torch.randn(2, 8), 0, math.nan, 4, "clip: expected 0 < clip <= 1, got nan"),
        (torch.randn(2, 8), 0, 1.0, 3, "bits: expected 4 or 8, got 3"),
        (torch.randn(2, 12), 8, 1.0, 4, "block: expected a divisor of 12, got 8"),
        (torch.randn(2, 12), 6, 1.0, 4, "block 6: no such order"),
    ],
)
def test_a_wrong_argument_is_named(
    x: torch.Tensor, block: int, clip: float, bits: int, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        ops.hadamard_quant(x, block, clip, bits) if block else ops.quant(x, clip, bits)


def test_a_block_that_was_never_prepared_is_refused() -> None:
    with pytest.raises(
        RuntimeError,
        match=(
            r"block: expected a prepared block, got 244\. Call smoothrot_vllm.ops.prepare_rotation"
        ),
    ):
        torch.ops.smoothrot.hadamard_quant(torch.randn(1, 244), 244, 1.0, 4)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("dtype", DTYPES)
def test_silu_mul_hadamard_quant_equals_the_reference(bits: int, dtype: torch.dtype) -> None:
    for size, block in ((14, 0), (130, 0), (576, 576), (1536, 768), (2048, 64)):
        gate_up = torch.cat(
            [awkward_rows(2 * size, dtype), (40 * torch.randn(5, 2 * size)).to(dtype)]
        )
        expected = reference.silu_mul_hadamard_quant(gate_up, block, 0.9, bits)
        assert_same(ops.silu_mul_hadamard_quant(gate_up, block, 0.9, bits), expected)


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("dtype", DTYPES)
def test_swigluoai_hadamard_quant_equals_the_reference(bits: int, dtype: torch.dtype) -> None:
    for size, block in ((14, 0), (130, 0), (576, 576), (1536, 768), (2048, 64)):
        gate_up = torch.cat(
            [awkward_rows(2 * size, dtype), (6 * torch.randn(9, 2 * size)).to(dtype)]
        )
        expected = reference.swigluoai_hadamard_quant(gate_up, block, 0.9, bits)
        assert_same(ops.swigluoai_hadamard_quant(gate_up, block, 0.9, bits), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_silu_mul_has_the_bits_of_torch_for_every_gate(dtype: torch.dtype) -> None:
    gate = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    gate = gate[gate.isfinite() & (gate >= -88)]
    # Alone in its row, a value is the row's scale: every bit of it shows.
    gate = torch.stack([gate, torch.zeros_like(gate)], dim=1)
    up = torch.randn(gate.shape).to(dtype)
    expected = ops.quant(torch.nn.functional.silu(gate) * up, 1.0, 8)
    assert_same(ops.silu_mul_hadamard_quant(torch.cat([gate, up], dim=1), 0, 1.0, 8), expected)


@pytest.mark.parametrize("size", [8, 24, 576, 2048, 2056, 8192])
@pytest.mark.parametrize("dtype", DTYPES)
def test_rms_norm_quant_equals_the_reference(size: int, dtype: torch.dtype) -> None:
    for bits in (4, 8):
        for weight, with_residual in ((None, False), (torch.rand(size).to(dtype), True)):
            x = awkward_rows(size, dtype)
            residual = torch.randn(x.shape).to(dtype) if with_residual else None
            codes, scale, added = reference.rms_norm_quant(x, weight, 1e-6, 0.9, bits, residual)
            assert_same(ops.rms_norm_quant(x, weight, 1e-6, 0.9, bits, residual), (codes, scale))
            torch.testing.assert_close(residual, added, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": torch.randn(2, 12)}, r"x: expected inputs in multiples of 8, got float32 \(2, 12\)"),
        ({"x": torch.randn(16)}, r"x: expected a contiguous \(tokens, inputs\) tensor"),
        (
            {"weight": torch.ones(8)},
            r"weight: expected contiguous float32 \(16\), got float32 \(8\)",
        ),
        (
            {"weight": torch.ones(16).half()},
            r"weight: expected contiguous float32 \(16\), got float16",
        ),
        ({"epsilon": -1.0}, "epsilon: expected a number of at least 0, got -1"),
        ({"epsilon": math.nan}, "epsilon: expected a number of at least 0, got nan"),
        ({"clip": 2.0}, "clip: expected 0 < clip <= 1, got 2"),
        ({"bits": 5}, "bits: expected 4 or 8, got 5"),
        (
            {"residual": torch.ones(1, 16)},
            r"residual: expected contiguous float32 \(2, 16\), got float32 \(1, 16\)",
        ),
    ],
)
def test_rms_norm_quant_names_a_wrong_argument(changes: dict[str, Any], message: str) -> None:
    arguments = {
        "x": torch.randn(2, 16),
        "weight": None,
        "epsilon": 1e-6,
        "clip": 1.0,
        "bits": 4,
        "residual": None,
    }
    with pytest.raises(ConfigError, match=f"rms_norm_quant: {message}"):
        ops.rms_norm_quant(**arguments | changes)
