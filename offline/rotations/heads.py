# SPDX-License-Identifier: Apache-2.0
"""R2 learned: one orthogonal matrix for each value head, for what o_proj reads and what v_proj
writes."""

import torch

from smoothrot_offline.quantize import quantize_rtn
from smoothrot_offline.quantize.straight_through import fake_quantize_shrunk, searched_shrink
from smoothrot_offline.rotate import DenseRotation
from smoothrot_offline.rotations.cayley import Learned, keep_better, learn_turn
from smoothrot_offline.rotations.product_error import (
    differentiable_error,
    rounded_error,
    split_tokens,
)
from smoothrot_vllm.format import ActivationScheme, WeightScheme

ANGLE = 0.05


def learn_head_rotations(
    inputs: torch.Tensor,
    output_weight: torch.Tensor,
    value_weight: torch.Tensor,
    start: torch.Tensor,
    *,
    activations: ActivationScheme,
    weights: WeightScheme,
    steps: int,
) -> Learned:
    """Orthogonal matrices near ``start`` with a smaller error of one attention block's values;
    ``start`` if none was found.

    The error is o_proj's relative layer error plus the relative rounding error of v_proj's weight,
    which o_proj reads in full. It is descended on by
    :func:`~smoothrot_offline.rotations.cayley.learn_turn`; one token in four is held out, and
    decides.

    Args:
        inputs: what o_proj reads before R2, float32 ``(tokens, heads * head_dim)``: concatenated
            query heads.
        output_weight: o_proj's, float32 ``(rows, heads * head_dim)``, before R2, after R1.
        value_weight: v_proj's, float32 ``(kv_heads * head_dim, d)``, before R2, after the norm fold
            and R1.
        start: orthogonal, float64 ``(kv_heads, head_dim, head_dim)``: ``rotate.head_matrices``.
        activations: scheme of o_proj's input.
        weights: scheme of both weights.
        steps: of Adam, each on all tokens; at least 1.

    Returns:
        Matrices ``(kv_heads, head_dim, head_dim)`` for
        :func:`~smoothrot_offline.rotate.rotate_heads`.
    """
    group = inputs.shape[1] // len(value_weight)
    values = DenseRotation(start.float()).rotate(value_weight.T)
    outputs = _query_heads(start.float(), group).rotate(output_weight)
    trained, held = split_tokens(_query_heads(start.float(), group).rotate(inputs))
    value_shrink, output_shrink = (
        searched_shrink(values.T, weights),
        searched_shrink(outputs, weights),
    )

    def loss(turn: torch.Tensor, _step: int) -> torch.Tensor:
        heads, value = _query_heads(turn, group), DenseRotation(turn).rotate(values).T
        error = differentiable_error(
            heads.rotate(trained), heads.rotate(outputs), output_shrink, activations, weights
        )
        return error + _rounding(value, fake_quantize_shrunk(value, value_shrink, weights.bits))

    def held_out(turn: torch.Tensor) -> float:
        heads, value = _query_heads(turn, group), DenseRotation(turn).rotate(values).T
        error = rounded_error(heads.rotate(held), heads.rotate(outputs), activations, weights)
        return error + float(_rounding(value, quantize_rtn(value, weights).dequantize()))

    return keep_better(start, learn_turn(loss, start, steps, ANGLE), held_out)


def _query_heads(matrices: torch.Tensor, group: int) -> DenseRotation:
    """Each query head by the matrix of the value head it reads."""
    return DenseRotation(matrices.repeat_interleave(group, dim=0))


def _rounding(weight: torch.Tensor, quantized: torch.Tensor) -> torch.Tensor:
    return (quantized - weight).square().sum() / weight.square().sum().clamp_min(
        torch.finfo(weight.dtype).tiny
    )
