# SPDX-License-Identifier: Apache-2.0
"""Each kernel and each tile on a GPU: forced by its name, against the reference, and the same
bits every time."""

from typing import Any

import pytest
import torch
from kernel_contract import EXPERTS, GEMMS, Gemm, KernelContract
from ops_contract import CLIP, Layer, Target, assert_same, assert_same_codes

from smoothrot_vllm import reference
from smoothrot_vllm.grouped_experts import grouped_experts

REPEATS = 20


class TestSmallKernels(KernelContract):
    """The contract's own shapes, ragged ones among them: what the sanitizer runs."""


class TestKernels(KernelContract):
    """Shapes that give every multiprocessor several blocks, and tokens that no tile divides."""

    tokens = (1, 8, 9, 16, 17, 63, 129, 1025)
    shapes = ((4096, 4096), (1000, 14336))
    groups = ((4096, 4096, 32), (1000, 14336, 128))
    row_count = 300


@pytest.mark.parametrize("gemm", GEMMS, ids=lambda gemm: gemm.name)
def test_a_gemm_gives_the_same_bits_each_time(target: Target, capability: int, gemm: Gemm) -> None:
    KernelContract.require(target, gemm.name)
    if capability not in gemm.capabilities:
        pytest.skip(f"{gemm.name} is for other architectures, which test_a_forced_gemm asserts")
    torch.manual_seed(0)
    weight_bits, act_bits = gemm.schemes[0]
    layer = target.layer(4096, 4096, -1, weight_bits, act_bits, torch.bfloat16)
    x = target.randn(min(300, gemm.most_tokens), 4096, dtype=torch.bfloat16)
    target.ops.force_cuda_gemm(gemm.name)
    try:
        results = [target.linear(layer, x, 4096) for _ in range(REPEATS)]
    finally:
        target.ops.force_cuda_gemm("")
    for again in results[1:]:
        assert_same(again, results[0])


@pytest.mark.parametrize("name", EXPERTS)
def test_experts_give_the_same_bits_each_time(target: Target, name: str) -> None:
    torch.manual_seed(0)
    given, gate_up, down = target.experts(300, 2, 8, 512, 1024, 4, torch.bfloat16)
    target.ops.force_cuda_gemm(name)
    try:
        packed = target.packed_experts((gate_up, down), 4)
        arguments: list[Any] = [*given, *packed, target.prepare(32), CLIP, 8, 4, -1]
        results = [grouped_experts(target.ops, *arguments) for _ in range(REPEATS)]
    finally:
        target.ops.force_cuda_gemm("")
    for again in results[1:]:
        assert_same(again, results[0])


def test_the_reference_gives_the_same_bits_on_the_gpu_as_on_the_cpu(target: Target) -> None:
    """Every other test takes it from the GPU."""
    torch.manual_seed(0)
    x, gate_up = torch.randn(5, 11008).bfloat16(), torch.randn(5, 2 * 14336).half()
    for bits in (4, 8):
        for got, expected in [
            (reference.quant(target.put(x), CLIP, bits), reference.quant(x, CLIP, bits)),
            (
                reference.hadamard_quant(target.put(x), 11008, CLIP, bits),
                reference.hadamard_quant(x, 11008, CLIP, bits),
            ),
            (
                reference.silu_mul_hadamard_quant(target.put(gate_up), 14336, CLIP, bits),
                reference.silu_mul_hadamard_quant(gate_up, 14336, CLIP, bits),
            ),
            (
                reference.rms_norm_quant(target.put(x), None, 1e-5, CLIP, bits)[:2],
                reference.rms_norm_quant(x, None, 1e-5, CLIP, bits)[:2],
            ),
        ]:
            assert_same_codes((got[0].cpu(), got[1].cpu()), expected)
        layer = target.layer(1000, 11008, -1, bits, bits, torch.float16)
        assert layer.bias is not None
        on_cpu = Layer(layer.stored.cpu(), layer.scale.cpu(), None, layer.bias.cpu(), bits, bits)
        assert_same(layer.expected(target.put(x)).cpu(), on_cpu.expected(x))
