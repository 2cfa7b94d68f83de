# SPDX-License-Identifier: Apache-2.0
"""The linears that a GPU's kernels are held against: torch's own, and those of vLLM and Humming
where they are installed.

Those named ``_mm`` are torch's products alone: their inputs are quantized beforehand, which is not
timed, while ours and the others are whole layers. torch has no fused quantization for them, so this
is the best that they can be.
"""

import importlib.util
from functools import partial
from typing import Any

import torch

from benchmarks.kernels.contenders import Maker, Peers, Rotating, torch_linear, vllm_ops

GROUP = 128
"""Inputs that share a scale in the peers' 4-bit weights: what all of them take."""
FP8 = torch.float8_e4m3fn

Weight = tuple[torch.Tensor, ...]


def find_peers() -> Peers:
    """bfloat16 and whichever others can be had, with the reason for each that cannot."""
    peers = Peers()
    peers.makers["bf16"] = torch_linear
    peers.makers["int8_mm"] = int8_mm
    peers.makers["fp8_mm"] = fp8_mm
    peers.find("vllm_w8a8", vllm_w8a8)
    peers.find("vllm_marlin_w4a16", vllm_marlin_w4a16)
    peers.find("vllm_machete_w4a16", vllm_machete_w4a16)
    peers.find("vllm_cutlass_w4a8", vllm_cutlass_w4a8)
    for bits in (4, 8):
        peers.find(f"humming_w4a{bits}", partial(humming, bits))
    return peers


def rotating(layer: Any, weight: Weight, cache_bytes: int, **options: Any) -> Rotating:
    """A layer over copies of all tensors of a weight."""
    return Rotating(
        layer,
        lambda: tuple(w.clone() for w in weight),
        sum(w.nbytes for w in weight),
        cache_bytes,
        **options,
    )


def int8_mm(columns: int, inputs: int, cache_bytes: int) -> Rotating:
    """``torch._int_mm``: int8 by int8 to int32, without scales; refuses up to 16 tokens on a
    GPU."""
    weight = torch.randint(-128, 128, (columns, inputs), dtype=torch.int8)
    return rotating(
        lambda x, w: torch._int_mm(x, w[0].t()), (weight,), cache_bytes, prepare=_int8_codes
    )


def _int8_codes(x: torch.Tensor) -> torch.Tensor:
    return (x * (127 / x.abs().max())).round().to(torch.int8)


def fp8_mm(columns: int, inputs: int, cache_bytes: int) -> Rotating:
    """``torch._scaled_mm``, with one scale for each token and each output."""

    def layer(x: Weight, w: Weight) -> torch.Tensor:
        return torch._scaled_mm(
            x[0], w[0].t(), x[1], w[1], out_dtype=torch.bfloat16, use_fast_accum=True
        )

    weight = torch.randn(columns, inputs).to(FP8), torch.ones(1, columns)
    return rotating(
        layer, weight, cache_bytes, prepare=lambda x: (x.to(FP8), torch.ones(len(x), 1))
    )


def vllm_w8a8() -> Maker:
    """vLLM's int8 linear: dynamic per-token quantization, then CUTLASS; raises what
    ``vllm_ops`` does."""
    vllm = vllm_ops("cutlass_scaled_mm")

    def linear(x: torch.Tensor, weight: Weight) -> torch.Tensor:
        codes, scale, _ = vllm.scaled_int8_quant(x)
        return vllm.cutlass_scaled_mm(codes, weight[0].t(), scale, weight[1], x.dtype)

    def make(columns: int, inputs: int, cache_bytes: int) -> Rotating:
        weight = torch.randint(-128, 128, (columns, inputs), dtype=torch.int8)
        return rotating(linear, (weight, torch.rand(columns, 1)), cache_bytes)

    return make


def _int4_by_inputs(columns: int, inputs: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes with eight 4-bit inputs of a column in each int32, as GPTQ stores them, and a
    bfloat16 scale per group."""
    codes = torch.randint(-(2**31), 2**31, (inputs // 8, columns), dtype=torch.int32)
    return codes, torch.rand(inputs // GROUP, columns, dtype=torch.bfloat16)


def vllm_marlin_w4a16() -> Maker:
    """vLLM's Marlin: 4-bit weights, 16-bit activations; raises what ``vllm_ops`` does."""
    vllm = vllm_ops("marlin_gemm")
    from vllm.model_executor.layers.quantization.utils import marlin_utils
    from vllm.scalar_type import scalar_types

    def make(columns: int, inputs: int, cache_bytes: int) -> Rotating:
        codes, scale = _int4_by_inputs(columns, inputs)
        packed = vllm.gptq_marlin_repack(codes, inputs, columns, 4)
        scale = marlin_utils.marlin_permute_scales(
            scale, size_k=inputs, size_n=columns, group_size=GROUP
        )
        zero_points = marlin_utils.marlin_make_empty(packed.device)

        def linear(x: torch.Tensor, weight: Weight) -> torch.Tensor:
            return marlin_utils.apply_gptq_marlin_linear(
                input=x,
                weight=weight[0],
                weight_scale=weight[1],
                weight_zp=zero_points,
                workspace=None,
                wtype=scalar_types.uint4b8,
                output_size_per_partition=columns,
                input_size_per_partition=inputs,
            )

        return rotating(linear, (packed, scale), cache_bytes)

    return make


def vllm_machete_w4a16() -> Maker:
    """vLLM's Machete for sm_90: 4-bit weights, 16-bit activations; raises what
    ``vllm_ops`` does."""
    vllm = vllm_ops("machete_mm")
    from vllm.scalar_type import scalar_types

    def make(columns: int, inputs: int, cache_bytes: int) -> Rotating:
        codes, scale = _int4_by_inputs(columns, inputs)
        by_column = codes.t().contiguous().t()
        kind, dtype = scalar_types.uint4b8, torch.bfloat16
        packed = vllm.machete_prepack_B(
            by_column, a_type=dtype, b_type=kind, group_scales_type=dtype
        )

        def linear(x: torch.Tensor, weight: Weight) -> torch.Tensor:
            return vllm.machete_mm(
                a=x, b_q=weight[0], b_type=kind, b_group_scales=weight[1], b_group_size=GROUP
            )

        return rotating(linear, (packed, scale), cache_bytes)

    return make


def vllm_cutlass_w4a8() -> Maker:
    """vLLM's CUTLASS for sm_90: 4-bit weights, dynamic per-token fp8; raises what
    ``vllm_ops`` does."""
    vllm = vllm_ops("cutlass_w4a8_mm")

    def linear(x: torch.Tensor, weight: Weight) -> torch.Tensor:
        codes, scale = vllm.scaled_fp8_quant(x, use_per_token_if_dynamic=True)
        return vllm.cutlass_w4a8_mm(
            a=codes,
            b_q=weight[0],
            b_group_scales=weight[1],
            b_group_size=GROUP,
            b_channel_scales=weight[2],
            a_token_scales=scale,
        )

    def make(columns: int, inputs: int, cache_bytes: int) -> Rotating:
        codes, scale = _int4_by_inputs(columns, inputs)
        packed = vllm.cutlass_encode_and_reorder_int4b(codes.t().contiguous().t())
        group_scale = vllm.cutlass_pack_scale_fp8(scale.to(FP8))
        return rotating(linear, (packed, group_scale, torch.rand(columns, 1)), cache_bytes)

    return make


def humming(act_bits: int) -> Maker:
    """Humming's 4-bit weights with per-token int4 or int8 activations, compiled at the first call.

    Raises:
        ImportError: Humming is not installed.
        RuntimeError: torch's default device is not a GPU.
    """
    if importlib.util.find_spec("humming") is None:
        raise ImportError("humming is not installed: pip install 'humming-kernels[cu13]'")
    if torch.get_default_device().type != "cuda":
        raise RuntimeError("humming runs on CUDA, this run does not")
    from humming.layer import HummingLayer

    def make(columns: int, inputs: int, cache_bytes: int) -> Rotating:
        weight = torch.randn(columns, inputs, dtype=torch.bfloat16)

        def layer() -> Any:
            one = HummingLayer(
                shape_n=columns,
                shape_k=inputs,
                weight_config={"dtype": "int4"},
                input_config={"dtype": f"int{act_bits}"},
                torch_dtype=torch.bfloat16,
            ).cuda()
            one.load_from_unquantized(weight)
            one.transform()
            return one

        return Rotating(lambda x, one: one(x), layer, columns * inputs // 2, cache_bytes)

    return make
