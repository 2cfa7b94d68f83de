# SPDX-License-Identifier: Apache-2.0
"""The layer error of a linear under smoothing scales: the number that searched and learned policies make small."""

from dataclasses import dataclass

import torch

from smoothrot_offline.quantize import quantize_rtn
from smoothrot_offline.quantize.straight_through import fake_quantize_tokens, fake_quantize_weight, largest_magnitude
from smoothrot_offline.rotate import hadamard
from smoothrot_vllm.format import LinearScheme
from smoothrot_vllm.reference import QUANT_MIN_SCALE


@dataclass(frozen=True)
class LayerError:
    """``sum_t v_t ||x_t W^T - Q(x_t / s H) Q(W s H)^T||^2``, activations per token, weights to nearest (arXiv 2506.01967).

    Args:
        sample: X, float32 ``(tokens, f)``.
        weight: W, float32 ``(hidden, f)``.
        scheme: of both quantisers.
        block: Hadamard block of R4, 0 for none.
        importance: v, float32 ``(tokens,)``; None counts every token alike, as the papers do.
    """

    sample: torch.Tensor
    weight: torch.Tensor
    scheme: LinearScheme
    block: int
    importance: torch.Tensor | None = None

    @torch.no_grad()
    def of(self, scales: torch.Tensor) -> float:
        """The error at scales s ``(f,)``, as the converter's own round-to-nearest leaves it."""
        x, w = self._smoothed(scales.float())
        return float(self._error(x, quantize_rtn(w, self.scheme.weights).dequantize()))

    @torch.no_grad()
    def shrink(self, scales: torch.Tensor) -> torch.Tensor:
        """Weight scales of the clip search at ``scales``, as fractions of the largest magnitude, ``(hidden, groups)``."""
        w = self._smoothed(scales.float())[1]
        scale = quantize_rtn(w, self.scheme.weights).scale
        return scale / largest_magnitude(w, scale.shape[1]).clamp_min(QUANT_MIN_SCALE)

    def differentiable(self, scales: torch.Tensor, shrink: torch.Tensor) -> torch.Tensor:
        """The error with a gradient in float32 ``scales (f,)``, straight through the rounding, for a given :meth:`shrink`."""
        x, w = self._smoothed(scales)
        weight_scale = (largest_magnitude(w, shrink.shape[1]) * shrink).clamp_min(QUANT_MIN_SCALE)
        return self._error(x, fake_quantize_weight(w, weight_scale, self.scheme.weights.bits))

    def _smoothed(self, scales: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x, w = self.sample / scales, self.weight * scales
        return (hadamard(x, self.block), hadamard(w, self.block)) if self.block else (x, w)

    def _error(self, x: torch.Tensor, quantized_weight: torch.Tensor) -> torch.Tensor:
        difference = fake_quantize_tokens(x, self.scheme.activations) @ quantized_weight.T - self.sample @ self.weight.T
        squares = difference.square().sum(dim=1)
        return (squares if self.importance is None else squares * self.importance).sum()
