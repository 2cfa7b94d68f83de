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


Weight = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]


def weight(outputs: int, inputs: int, group: int | None = None, bits: int = 4) -> Weight:
    """Codes, scales and group scales."""
    top = reference.quant_max(bits)
    codes = torch.randint(-top - 1, top + 1, (outputs, inputs), dtype=torch.int8)
    groups = None
    if group is not None:
        groups = torch.randint(1, 16, (outputs, inputs // group), dtype=torch.uint8)
    return reference.encode(codes, bits), torch.rand(outputs, 1) * 0.01, groups


@pytest.mark.parametrize("capability", [80, 90, 120])
@pytest.mark.parametrize(
    ("weight_bits", "group"), [(4, None), (8, None), (4, 32), (4, 64), (4, 128)]
)
@pytest.mark.parametrize("act_bits", [4, 8])
@pytest.mark.parametrize("block", [0, 384])
def test_linear_equals_the_reference_on_every_architecture(
    gpu: Any, capability: int, weight_bits: int, group: int | None, act_bits: int, block: int
) -> None:
    inputs = 384
    layer = weight(40, inputs, group, weight_bits)
    packed = gpu.prepack_weight(*layer, weight_bits)
    bias = torch.randn(40)
    if block:
        prepare(gpu, block)
    cases = ((1, torch.float16), (20, torch.bfloat16), (70, torch.float32), (260, torch.float16))
    for tokens, dtype in cases:
        gpu.pretend(capability, 1, 99 * 1024)
        x = torch.randn(tokens, inputs).to(dtype)
        quantized = (
            reference.hadamard_quant(x, block, 0.9, act_bits)
            if block
            else reference.quant(x, 0.9, act_bits)
        )
        bits = (act_bits, weight_bits)
        arguments: list[Any] = [*quantized, *layer, bias.to(dtype), dtype, *bits]
        expected = reference.gemm(*arguments)
        got = gpu.linear(
            x, packed, layer[1], bias.to(dtype), block, 0.9, *bits, -1 if group is None else group
        )
        torch.testing.assert_close(got, expected, rtol=0, atol=0)
        launched = ""
        if tokens in (20, 260):
            channel = weight_bits == 4 and group is None
            if capability == 80 and act_bits == 4 and channel:
                launched = "sm80_"
            elif capability == 90 and channel:
                launched = "sm90_128"
            elif capability == 90 and (weight_bits == 8 or tokens == 260):
                launched = "sm90_s8_"
        assert gpu.launched().startswith(launched)
        assert bool(gpu.launched()) == bool(launched)


def test_a_weight_too_large_to_expand_at_once_is_multiplied_in_parts(gpu: Any) -> None:
    """304 outputs of 131040 inputs are 40 MB; 256 are multiplied at a time."""
    inputs, outputs = 131040, 304
    codes = torch.randint(0, 256, (outputs, inputs // 2), dtype=torch.uint8)
    groups = torch.randint(1, 16, (outputs, inputs // 32), dtype=torch.uint8)
    scale, weight_scale = torch.rand(1), torch.rand(outputs, 1) * 1e-6
    activations = torch.randint(-128, 128, (1, inputs), dtype=torch.int8)
    bias = torch.randn(outputs).half()
    expected = reference.gemm(
        activations, scale, codes, weight_scale, groups, bias, torch.float16, 8, 4
    )
    packed = gpu.prepack_weight(codes, weight_scale, groups, 4)
    gpu.pretend(90, 1, 99 * 1024)
    gpu.force_cuda_gemm("cutlass_sm90_s8_128x64")
    try:
        got = gpu.gemm(activations, scale, packed, weight_scale, bias, torch.float16, 8, 4, 32)
    finally:
        gpu.force_cuda_gemm("")
    torch.testing.assert_close(got, expected, rtol=0, atol=0)


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
    packed, scale, _ = weight(40, x.shape[-1] or 64)
    with pytest.raises(RuntimeError, match=f"smoothrot::linear: {message}"):
        gpu.linear(x, packed, scale, None, block, 1.0, bits, 4, -1)


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
            {"weight_scale": torch.ones(40, 2)},
            r"weight_scale: expected contiguous float32 \(any, 1\), got float32 \(40, 2\)",
        ),
        ({"weight_scale": torch.ones(0, 1)}, r"weight_scale: expected at least one output"),
        (
            {"group_size": 16},
            r"group_size: expected -1 or, of 4-bit weights, 32, 64 or 128 .* got 16",
        ),
        ({"group_size": 0}, r"group_size: expected -1 or"),
        ({"group_size": 128}, r"group_size: expected .* dividing the 64 inputs, got 128"),
        ({"group_size": 32, "weight_bits": 8}, r"group_size: .* got 32 of 8-bit weights"),
        (
            {"group_size": 32},
            r"packed: expected contiguous uint8 \(1440\), got uint8 \(40, 32\)",
        ),
        (
            {"group_size": 32, "packed": torch.zeros(1441, dtype=torch.uint8)},
            r"packed: expected contiguous uint8 \(1440\), got uint8 \(1441\)",
        ),
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
        "group_size": -1,
    }
    with pytest.raises(RuntimeError, match=f"smoothrot::gemm: {message}"):
        gpu.gemm(*(arguments | changes).values())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bits": 3}, r"bits: expected 4 or 8, got 3"),
        ({"weight": torch.zeros(40, 33, dtype=torch.uint8)}, r"weight: expected inputs in multip"),
        ({"weight": torch.zeros(39, 64, dtype=torch.uint8)}, r"weight: expected .* \(40, any\)"),
        ({"weight_scale": torch.ones(40, 2)}, r"weight_scale: expected .* \(any, 1\)"),
        (
            {"group_scale": torch.ones(40, 4)},
            r"group_scale: expected contiguous uint8 \(40, any\), got float32",
        ),
        (
            {"group_scale": torch.ones(40, 3, dtype=torch.uint8)},
            r"group_scale: expected \(40, groups\) with groups dividing the 128",
        ),
        (
            {"group_scale": torch.ones(40, 8, dtype=torch.uint8)},
            r"group_size: expected -1 or, of 4-bit weights, 32, 64 or 128 .* got 16",
        ),
        (
            {"weight": torch.zeros(40, 128, dtype=torch.int8), "bits": 8},
            r"group_size: .* of 8-bit weights",
        ),
    ],
)
def test_prepack_weight_names_a_wrong_argument(
    gpu: Any, changes: dict[str, Any], message: str
) -> None:
    arguments: dict[str, Any] = {
        "weight": torch.zeros(40, 64, dtype=torch.uint8),
        "weight_scale": torch.ones(40, 1),
        "group_scale": torch.ones(40, 4, dtype=torch.uint8),
        "bits": 4,
    }
    with pytest.raises(RuntimeError, match=f"smoothrot::prepack_weight: {message}"):
        gpu.prepack_weight(*(arguments | changes).values())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"codes": torch.zeros(2, 64, dtype=torch.uint8)}, r"codes: expected contiguous int8"),
        ({"scale": torch.ones(3)}, r"scale: expected contiguous float32 \(2\), got float32 \(3\)"),
        (
            {"packed": torch.zeros(40, 32, dtype=torch.uint8)},
            r"packed: expected contiguous uint8 \(40, any, any\), got uint8",
        ),
        ({"group_size": 32}, r"packed: expected contiguous uint8 \(3, any\), got uint8"),
        (
            {"group_size": 32, "packed": torch.zeros(3, 1441, dtype=torch.uint8)},
            r"packed: expected contiguous uint8 \(1440\), got uint8 \(1441\)",
        ),
        ({"group_size": 96}, r"packed: expected contiguous uint8 \(3, any\), got uint8"),
        (
            {"packed": torch.zeros(0, 40, 32, dtype=torch.uint8)},
            r"packed: expected \(experts, \.\.\.\), got uint8",
        ),
        (
            {"packed": torch.tensor(0, dtype=torch.uint8)},
            r"packed: expected \(experts, \.\.\.\), got uint8 \(\)",
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
            r"weight_scale: expected contiguous float32 \(3, any, 1\), got",
        ),
        (
            {"weight_scale": torch.ones(3, 40, 4)},
            r"weight_scale: expected contiguous float32 \(3, any, 1\), got",
        ),
        ({"bias": torch.ones(3, 40)}, r"bias: expected none, as no kernel for GPUs adds one"),
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
        "bias": None,
        "tiles": torch.zeros(3, 1, dtype=torch.int32),
        "out_dtype": torch.float16,
        "act_bits": 8,
        "weight_bits": 4,
        "group_size": -1,
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
