# SPDX-License-Identifier: Apache-2.0
"""The CUDA ops' own code on a make-believe GPU: what is refused, and which kernel is launched."""

from typing import Any

import pytest
import torch

from smoothrot_vllm import reference
from smoothrot_vllm.hadamard import base_matrix, factorize


def prepare(ops: Any, block: int) -> int:
    """Make the rotation known to the emulated device."""
    factors = factorize(block)
    assert factors is not None
    ops.prepare_cuda_rotation(base_matrix(factors.base), factors.power, -1)
    return block


def weight(
    outputs: int, inputs: int, groups: int = 1, bits: int = 4
) -> tuple[torch.Tensor, torch.Tensor]:
    top = reference.quant_max(bits)
    codes = torch.randint(-top - 1, top + 1, (outputs, inputs), dtype=torch.int8)
    return reference.encode(codes, bits), torch.rand(outputs, groups) * 0.01


@pytest.mark.parametrize("capability", [80, 90, 120])
@pytest.mark.parametrize(("weight_bits", "act_bits"), [(4, 4), (4, 8), (8, 4), (8, 8)])
@pytest.mark.parametrize(("block", "groups"), [(0, 1), (96, 1), (96, 3)])
def test_linear_equals_the_reference_on_every_architecture(
    gpu: Any, capability: int, weight_bits: int, act_bits: int, block: int, groups: int
) -> None:
    stored, scale = weight(40, 96, groups, weight_bits)
    packed = gpu.prepack_weight(stored, scale, weight_bits)
    bias = torch.randn(40)
    if block:
        prepare(gpu, block)
    for tokens, dtype in ((1, torch.float16), (20, torch.bfloat16), (70, torch.float32)):
        gpu.pretend(capability, 1, 99 * 1024)
        x = torch.randn(tokens, 96).to(dtype)
        quantized = (
            reference.hadamard_quant(x, block, 0.9, act_bits)
            if block
            else reference.quant(x, 0.9, act_bits)
        )
        expected = reference.gemm(
            *quantized, stored, scale, bias.to(dtype), dtype, act_bits, weight_bits
        )
        got = gpu.linear(x, packed, scale, bias.to(dtype), block, 0.9, act_bits, weight_bits)
        # Group sums are added in another order than torch's einsum does.
        tolerance = {"rtol": 0, "atol": 0} if groups == 1 else {"rtol": 1e-2, "atol": 1e-2}
        torch.testing.assert_close(got, expected, **tolerance)
        native = capability == 80 and act_bits == 4
        uses_cutlass = (
            weight_bits == 4 and groups == 1 and tokens == 20 and (native or capability == 90)
        )
        assert bool(gpu.launched()) == uses_cutlass, gpu.launched()


def misaligned(*shape: int, dtype: torch.dtype = torch.float16) -> torch.Tensor:
    """Contiguous, one element past an aligned address."""
    return torch.zeros(1 + torch.Size(shape).numel(), dtype=dtype)[1:].view(shape)


X = torch.ones(2, 64, dtype=torch.float16)


@pytest.mark.parametrize(
    ("x", "block", "bits", "message"),
    [
        (X.double(), 0, 4, r"x: expected float32, bfloat16 or float16, got float64"),
        (X.to("meta"), 0, 4, r"x: expected a tensor on a CUDA device, got another device"),
        (X.T, 0, 4, r"x: expected a contiguous .* not contiguous"),
        (torch.ones(2, 48), 0, 4, r"x: expected inputs in multiples of 32, at most 32768, got 48"),
        (
            torch.ones(1, 32800),
            0,
            4,
            r"x: expected inputs in multiples of 32, at most 32768, got 32800",
        ),
        (torch.ones(2, 0), 0, 4, r"x: expected an even number of inputs, got 0"),
        (
            misaligned(2, 64),
            0,
            4,
            r"x: expected data at a multiple of 16 bytes, got an address 2 bytes past one",
        ),
        (X, 128, 4, r"block: expected a divisor of 64, got 128"),
        (
            X,
            16,
            4,
            r"block: expected a prepared block, got 16\. Call .*prepare_rotation\(16, device\)",
        ),
        (X, 0, 6, r"bits: expected 4 or 8, got 6"),
    ],
)
def test_linear_names_a_wrong_input(
    gpu: Any, x: torch.Tensor, block: int, bits: int, message: str
) -> None:
    packed, scale = weight(40, x.shape[-1]) if x.shape[-1] else weight(40, 64)
    with pytest.raises(RuntimeError, match=f"smoothrot::linear: {message}"):
        gpu.linear(x, packed, scale, None, block, 1.0, bits, 4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"packed": torch.zeros(40, 32, dtype=torch.int8)},
            r"packed: expected contiguous uint8 \(40, 32\), got int8",
        ),
        (
            {"packed": torch.zeros(40, 31, dtype=torch.uint8)},
            r"packed: expected contiguous uint8 \(40, 32\), got uint8 \(40, 31\)",
        ),
        (
            {"packed": torch.zeros(40, 32, dtype=torch.uint8, device="meta")},
            r"packed: .* not on the CPU",
        ),
        (
            {"packed": misaligned(40, 32, dtype=torch.uint8)},
            r"packed: expected data at a multiple of 16 bytes",
        ),
        (
            {"weight_scale": torch.ones(40, 4)},
            r"weight_scale: expected groups of a multiple of 32 inputs, got 16",
        ),
        (
            {"weight_scale": torch.ones(40, 3)},
            r"weight_scale: expected \(outputs, groups\) with groups dividing the 64",
        ),
        ({"weight_scale": torch.ones(0, 1)}, r"weight_scale: expected \(outputs, groups\)"),
        ({"weight_scale": torch.ones(40, 1).half()}, r"weight_scale: expected contiguous float32"),
        ({"bias": torch.ones(39)}, r"bias: expected contiguous float32 \(40\), got float32 \(39\)"),
        (
            {"bias": torch.ones(40, dtype=torch.int32)},
            r"bias: expected float32, bfloat16 or float16, got int32",
        ),
        ({"weight_bits": 3}, r"weight_bits: expected 4 or 8, got 3"),
        ({"weight_bits": 8}, r"packed: expected contiguous int8 \(40, 64\), got uint8 \(40, 32\)"),
        ({"act_bits": 2}, r"act_bits: expected 4 or 8, got 2"),
        (
            {"out_dtype": torch.float64},
            r"out_dtype: expected float32, bfloat16 or float16, got float64",
        ),
        ({"scale": torch.ones(3)}, r"scale: expected contiguous float32 \(2\), got float32 \(3\)"),
        ({"codes": torch.zeros(2, 64, dtype=torch.uint8)}, r"codes: expected contiguous int8"),
    ],
)
def test_gemm_names_a_wrong_argument(gpu: Any, changes: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {
        "codes": torch.zeros(2, 64, dtype=torch.int8),
        "scale": torch.ones(2),
        "packed": torch.zeros(40, 32, dtype=torch.uint8),
        "weight_scale": torch.ones(40, 1),
        "bias": None,
        "out_dtype": torch.float16,
        "act_bits": 8,
        "weight_bits": 4,
    }
    with pytest.raises(RuntimeError, match=f"smoothrot::gemm: {message}"):
        gpu.gemm(*(arguments | changes).values())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"codes": torch.zeros(2, 64, dtype=torch.uint8)}, r"codes: expected contiguous int8"),
        ({"scale": torch.ones(3)}, r"scale: expected contiguous float32 \(2\), got float32 \(3\)"),
        (
            {"packed": torch.zeros(40, 32, dtype=torch.uint8)},
            r"packed: expected contiguous uint8 \(40, any, any\), got uint8",
        ),
        (
            {"packed": torch.zeros(0, 40, 32, dtype=torch.uint8)},
            r"packed: expected \(experts, outputs, inputs\), got uint8",
        ),
        (
            {"packed": torch.tensor(0, dtype=torch.uint8)},
            r"packed: expected \(experts, outputs, inputs\), got uint8 \(\)",
        ),
        (
            {"packed": torch.zeros(3, 40, 31, dtype=torch.uint8)},
            r"packed: expected contiguous uint8 \(40, 32\), got .*\(40, 31\)",
        ),
        (
            {"packed": torch.zeros(3, 40, 32, dtype=torch.uint8, device="meta")},
            r"packed: .* not on the CPU",
        ),
        (
            {"weight_scale": torch.ones(2, 40, 1)},
            r"weight_scale: expected contiguous float32 \(3, any, any\), got",
        ),
        (
            {"weight_scale": torch.ones(3, 40, 4)},
            r"weight_scale: expected groups of a multiple of 32 inputs, got 16",
        ),
        ({"tiles": torch.zeros(3, 1)}, r"tiles: expected contiguous int32 \(3, any\), got float32"),
        (
            {"tiles": torch.zeros(4, 1, dtype=torch.int32)},
            r"tiles: expected contiguous int32 \(3, any\), got int32 \(4, 1\)",
        ),
        ({"tiles": torch.zeros(2, 3, dtype=torch.int32).T}, r"tiles: .* not contiguous"),
        (
            {"out_dtype": torch.float64},
            r"out_dtype: expected float32, bfloat16 or float16, got float64",
        ),
        ({"act_bits": 2}, r"act_bits: expected 4 or 8, got 2"),
        ({"weight_bits": 3}, r"weight_bits: expected 4 or 8, got 3"),
    ],
)
def test_gemm_experts_names_a_wrong_argument(
    gpu: Any, changes: dict[str, Any], message: str
) -> None:
    arguments: dict[str, Any] = {
        "codes": torch.zeros(2, 64, dtype=torch.int8),
        "scale": torch.ones(2),
        "packed": torch.zeros(3, 40, 32, dtype=torch.uint8),
        "weight_scale": torch.ones(3, 40, 1),
        "tiles": torch.zeros(3, 1, dtype=torch.int32),
        "out_dtype": torch.float16,
        "act_bits": 8,
        "weight_bits": 4,
    }
    with pytest.raises(RuntimeError, match=f"smoothrot::gemm_experts: {message}"):
        gpu.gemm_experts(*(arguments | changes).values())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"rows": torch.ones(4, 8).half()},
            r"rows: expected contiguous float32 \(any, any\), got float16",
        ),
        ({"rows": torch.ones(4, 0)}, r"rows: expected at least one output"),
        (
            {"sources": torch.zeros(2, 2)},
            r"sources: expected contiguous int32 \(any, any\), got float32",
        ),
        (
            {"sources": torch.zeros(2, 0, dtype=torch.int32), "weights": torch.ones(2, 0)},
            r"sources: expected at least one source",
        ),
        (
            {"weights": torch.ones(2, 3)},
            r"weights: expected contiguous float32 \(2, 2\), got float32 \(2, 3\)",
        ),
        ({"weights": torch.ones(2, 2, device="meta")}, r"weights: .* not on the CPU"),
        (
            {"out_dtype": torch.int32},
            r"out_dtype: expected float32, bfloat16 or float16, got int32",
        ),
    ],
)
def test_combine_experts_names_a_wrong_argument(
    gpu: Any, changes: dict[str, Any], message: str
) -> None:
    arguments: dict[str, Any] = {
        "rows": torch.ones(4, 8),
        "sources": torch.zeros(2, 2, dtype=torch.int32),
        "weights": torch.ones(2, 2),
        "out_dtype": torch.float32,
    }
    with pytest.raises(RuntimeError, match=f"smoothrot::combine_experts: {message}"):
        gpu.combine_experts(*(arguments | changes).values())


def test_a_row_too_wide_for_the_shared_memory_is_refused(gpu: Any) -> None:
    gpu.pretend(86, 80, 48 * 1024)
    prepare(gpu, 16384)
    with pytest.raises(
        RuntimeError,
        match=r"x: expected rows that fit into the 49152 bytes of shared memory .*16384 inputs",
    ):
        gpu.hadamard_quant(torch.ones(1, 16384), 16384, 1.0, 4)


def test_a_base_matrix_that_is_no_matrix_is_refused(gpu: Any) -> None:
    with pytest.raises(
        RuntimeError,
        match="base_matrix: expected a square matrix of order 1 or a multiple of 4 up to 252",
    ):
        gpu.prepare_cuda_rotation(torch.ones(6, 6, dtype=torch.int8), 2, -1)
    with pytest.raises(RuntimeError, match="power: expected a power of two, got 3"):
        gpu.prepare_cuda_rotation(torch.ones(1, 1, dtype=torch.int8), 3, -1)


@pytest.mark.parametrize(
    ("capability", "tokens", "outputs", "act_bits", "weight_bits", "kernel"),
    [
        (80, 1, 4096, 4, 4, "small"),
        (80, 16, 4096, 8, 4, "small"),
        (80, 17, 4096, 4, 4, "cutlass_sm80_32x64"),
        (80, 128, 4096, 4, 4, "cutlass_sm80_32x64"),
        (80, 128, 28672, 4, 4, "cutlass_sm80_128x256"),
        (80, 128, 14336, 4, 4, "cutlass_sm80_128x128"),
        (80, 512, 4096, 4, 4, "cutlass_sm80_128x128"),
        (86, 2048, 4096, 4, 4, "cutlass_sm80_128x256"),
        (89, 64, 4096, 8, 4, "s8"),
        (90, 1, 4096, 4, 4, "small"),
        (90, 17, 4096, 4, 4, "cutlass_sm90_128x32"),
        (90, 4096, 4096, 8, 4, "cutlass_sm90_128x128"),
        (100, 4096, 4096, 4, 4, "s8"),
        (121, 4096, 4096, 8, 4, "s8"),
        (90, 16, 128256, 8, 8, "small"),
        (80, 512, 4096, 8, 8, "s8"),
        (90, 4096, 4096, 8, 8, "s8"),
    ],
)
def test_the_kernel_suits_the_device_and_the_size(
    gpu: Any,
    capability: int,
    tokens: int,
    outputs: int,
    act_bits: int,
    weight_bits: int,
    kernel: str,
) -> None:
    gpu.pretend(capability, 108, 99 * 1024)
    assert (
        gpu.choose(tokens, outputs, 4096, 4096, act_bits, weight_bits, torch.bfloat16, None)
        == kernel
    )


@pytest.mark.parametrize(
    ("outputs", "group", "out_dtype", "bias_dtype"),
    [
        (4096, 128, torch.float16, None),  # group scales
        (4092, 4096, torch.float16, None),  # outputs that 16-byte stores do not divide
        (4096, 4096, torch.float32, None),
        (4096, 4096, torch.float16, torch.float32),  # a bias of another dtype
    ],
)
def test_cutlass_is_not_asked_for_what_it_cannot_do(
    gpu: Any, outputs: int, group: int, out_dtype: torch.dtype, bias_dtype: torch.dtype | None
) -> None:
    assert gpu.choose(512, outputs, 4096, group, 4, 4, out_dtype, bias_dtype) == "s8"


@pytest.mark.parametrize(
    ("capability", "runs"),
    [
        (75, False),
        (80, True),
        (86, True),
        (89, True),
        (90, True),
        (91, False),
        (100, True),
        (103, True),
        (110, False),
        (121, True),
    ],
)
def test_machine_code_runs_within_its_family(gpu: Any, capability: int, runs: bool) -> None:
    assert gpu.runs_on("80 90a 100 120", capability) is runs
