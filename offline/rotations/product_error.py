# SPDX-License-Identifier: Apache-2.0
"""The layer error of a quantised product relative to its output: what learned rotations make small.

``||X W^T - Q(X R) Q(W R)^T||^2 / ||X W^T||^2``: local to a layer, as in KurTail (arXiv 2503.01483),
whose kurtosis stands in for this very error (arXiv 2506.01967).
"""

import torch

from smoothrot_offline.quantize import quantize_rtn
from smoothrot_offline.quantize.straight_through import fake_quantize_shrunk, fake_quantize_tokens
from smoothrot_vllm.format import ActivationScheme, WeightScheme

HELD_TOKENS = 4
"""One token in this many is held out of what is learned from."""

_LEAST_OUTPUT = torch.finfo(torch.float32).tiny


@torch.no_grad()
def rounded_error(
    x: torch.Tensor, weight: torch.Tensor, activations: ActivationScheme, weights: WeightScheme
) -> float:
    """The error of ``x (tokens, n)`` times ``weight (rows, n)``, both rotated, as the
    converter's round-to-nearest leaves it."""
    return float(_relative(x, weight, quantize_rtn(weight, weights).dequantize(), activations))


def differentiable_error(
    x: torch.Tensor,
    weight: torch.Tensor,
    shrink: torch.Tensor,
    activations: ActivationScheme,
    weights: WeightScheme,
) -> torch.Tensor:
    """:func:`rounded_error` with a gradient straight through the rounding, for the clip search's
    ``shrink (rows, groups)``."""
    return _relative(x, weight, fake_quantize_shrunk(weight, shrink, weights.bits), activations)


def _relative(
    x: torch.Tensor, weight: torch.Tensor, quantized: torch.Tensor, activations: ActivationScheme
) -> torch.Tensor:
    # Any one rotation of both leaves the exact product as it is: there is no gradient to follow in
    # it.
    exact = x.detach() @ weight.detach().T
    error = fake_quantize_tokens(x, activations) @ quantized.T - exact
    return error.square().sum() / exact.square().sum().clamp_min(_LEAST_OUTPUT)


def split_tokens(inputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The tokens of ``inputs (tokens, n)`` to learn from, and those held out."""
    held = torch.arange(len(inputs), device=inputs.device) % HELD_TOKENS == HELD_TOKENS - 1
    return inputs[~held], inputs[held]
