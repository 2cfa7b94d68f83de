# SPDX-License-Identifier: Apache-2.0
"""Fake kernels of the compiled ops: shape and dtype of what each returns, for tracing.
:mod:`smoothrot_vllm.ops` imports it."""

import torch

PANEL_COLUMNS = 32
"""Output columns of one panel of the prepacked layout, see csrc/common/layout.h."""
GROUPS_OF_A_WORD = 8
"""Group scales in one of the 32-bit words behind the codes on a GPU, see csrc/cuda/launch.h."""


@torch.library.register_fake("smoothrot::quant")
def _quant_fake(x: torch.Tensor, clip: float, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    tokens, inputs = x.shape
    codes = (
        x.new_empty((tokens, inputs // 2), dtype=torch.uint8)
        if bits == 4
        else x.new_empty(x.shape, dtype=torch.int8)
    )
    return codes, x.new_empty((tokens,), dtype=torch.float32)


@torch.library.register_fake("smoothrot::hadamard_quant")
def _hadamard_quant_fake(
    x: torch.Tensor, block: int, clip: float, bits: int
) -> tuple[torch.Tensor, torch.Tensor]:
    return _quant_fake(x, clip, bits)


@torch.library.register_fake("smoothrot::silu_mul_hadamard_quant")
@torch.library.register_fake("smoothrot::swigluoai_hadamard_quant")
def _gated_quant_fake(
    gate_up: torch.Tensor, block: int, clip: float, bits: int
) -> tuple[torch.Tensor, torch.Tensor]:
    return _quant_fake(gate_up[:, : gate_up.shape[1] // 2], clip, bits)


@torch.library.register_fake("smoothrot::rms_norm_quant")
def _rms_norm_quant_fake(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    epsilon: float,
    clip: float,
    bits: int,
    residual: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    return _quant_fake(x, clip, bits)


@torch.library.register_fake("smoothrot::prepack_weight")
def _prepack_weight_fake(
    weight: torch.Tensor, weight_scale: torch.Tensor, group_scale: torch.Tensor | None, bits: int
) -> torch.Tensor:
    *experts, outputs, columns = weight.shape
    groups = 0 if group_scale is None else group_scale.shape[-1]
    if weight.device.type == "cuda":
        if not groups:
            return torch.empty_like(weight)
        words = (groups + GROUPS_OF_A_WORD - 1) // GROUPS_OF_A_WORD
        scale_bytes = (outputs * words + 3) // 4 * 16
        return weight.new_empty((*experts, outputs * columns + scale_bytes), dtype=torch.uint8)
    inputs = columns * (2 if bits == 4 else 1)
    steps = (inputs + 3) // 4
    panels = (outputs + PANEL_COLUMNS - 1) // PANEL_COLUMNS
    group_bytes = (groups * PANEL_COLUMNS // 2 + 63) // 64 * 64
    panel_bytes = PANEL_COLUMNS * (4 + steps * bits // 2) + group_bytes
    return weight.new_empty((*experts, panels, panel_bytes), dtype=torch.uint8)


@torch.library.register_fake("smoothrot::gemm")
def _gemm_fake(
    codes: torch.Tensor,
    scale: torch.Tensor,
    packed: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    out_dtype: torch.dtype,
    act_bits: int,
    weight_bits: int,
    group_size: int,
) -> torch.Tensor:
    return codes.new_empty((codes.shape[0], weight_scale.shape[0]), dtype=out_dtype)


@torch.library.register_fake("smoothrot::linear")
@torch.library.register_fake("smoothrot::silu_mul_linear")
def _linear_fake(
    x: torch.Tensor,
    packed: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    block: int,
    clip: float,
    act_bits: int,
    weight_bits: int,
    group_size: int,
) -> torch.Tensor:
    return x.new_empty((*x.shape[:-1], weight_scale.shape[0]))


@torch.library.register_fake("smoothrot::experts")
def _experts_fake(
    x: torch.Tensor,
    weights: torch.Tensor,
    chosen: torch.Tensor,
    w13: torch.Tensor,
    w13_scale: torch.Tensor,
    w2: torch.Tensor,
    w2_scale: torch.Tensor,
    block: int,
    clip: float,
    act_bits: int,
    weight_bits: int,
    group_size: int,
    w13_bias: torch.Tensor | None = None,
    w2_bias: torch.Tensor | None = None,
    activation: str = "silu",
) -> torch.Tensor:
    return x.new_empty((x.shape[0], w2_scale.shape[1]))
