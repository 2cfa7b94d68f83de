# SPDX-License-Identifier: Apache-2.0
"""The quantisers as functions with a gradient: rounding passes it straight through (STE),
clamping stops it."""

import torch

from smoothrot_offline.quantize.rtn import weight_scale
from smoothrot_vllm.format import ActivationScheme, WeightScheme
from smoothrot_vllm.reference import QUANT_MIN_SCALE, quant_max


class _RoundThrough(torch.autograd.Function):
    """Round to nearest, ties to even; the gradient is that of the identity (Bengio et al., arXiv
    1308.3432)."""

    @staticmethod
    def forward(_context: object, x: torch.Tensor) -> torch.Tensor:
        return x.round()

    @staticmethod
    def backward(_context: object, gradient: torch.Tensor) -> torch.Tensor:
        return gradient


def fake_quantize(x: torch.Tensor, scale: torch.Tensor, bits: int) -> torch.Tensor:
    """``scale * clamp(round(x / scale))``, differentiable in both; ``scale`` broadcasts against
    ``x``."""
    top = quant_max(bits)
    rounded: torch.Tensor = _RoundThrough.apply(x / scale)
    return rounded.clamp(-top - 1, top) * scale


def fake_quantize_tokens(
    x: torch.Tensor, scheme: ActivationScheme, clip: torch.Tensor | None = None
) -> torch.Tensor:
    """``x (..., channels)`` as the server quantises it, per token; the values of
    ``reference.quant`` up to float rounding.

    Args:
        x: float32.
        scheme: bits, and the clip unless another is given.
        clip: a trainable clip, a scalar tensor.
    """
    ratio = (scheme.clip if clip is None else clip) / quant_max(scheme.bits)
    scale = x.abs().amax(dim=-1, keepdim=True) * ratio
    return fake_quantize(x, torch.where(scale < QUANT_MIN_SCALE, 1.0, scale), scheme.bits)


def fake_quantize_weight(weight: torch.Tensor, scale: torch.Tensor, bits: int) -> torch.Tensor:
    """A weight ``(N, K)`` with scales ``(N, G)``, as ``QuantizedWeight.dequantize`` gives it
    back."""
    grouped = weight.unflatten(1, (scale.shape[1], -1))
    return fake_quantize(grouped, scale[:, :, None], bits).flatten(1)


def largest_magnitude(weight: torch.Tensor, groups: int) -> torch.Tensor:
    """``max |w|`` of each row's groups, ``(N, groups)``."""
    return weight.unflatten(1, (groups, -1)).abs().amax(dim=2)


def searched_shrink(weight: torch.Tensor, scheme: WeightScheme) -> torch.Tensor:
    """What the clip search makes of each scale of a weight ``(N, K)``: a fraction of the largest
    magnitude, ``(N, groups)``."""
    scale = weight_scale(weight, scheme)
    return scale / largest_magnitude(weight, scale.shape[1]).clamp_min(QUANT_MIN_SCALE)


def fake_quantize_shrunk(weight: torch.Tensor, shrink: torch.Tensor, bits: int) -> torch.Tensor:
    """A weight ``(N, K)`` quantised with scales that are a given fraction ``shrink (N, groups)``
    of its largest magnitudes."""
    scale = (largest_magnitude(weight, shrink.shape[1]) * shrink).clamp_min(QUANT_MIN_SCALE)
    return fake_quantize_weight(weight, scale, bits)
