# SPDX-License-Identifier: Apache-2.0
"""The layer error of a linear under smoothing scales: the number that searched and learned
policies make small."""

from dataclasses import dataclass

import torch

from smoothrot_offline.quantize import quantize_rtn
from smoothrot_offline.quantize.straight_through import (
    fake_quantize_shrunk,
    fake_quantize_tokens,
    searched_shrink,
)
from smoothrot_offline.rotate import hadamard
from smoothrot_vllm.format import LinearScheme


@dataclass(frozen=True)
class LayerError:
    """``sum_t ||x_t W^T - Q(x_t / s H) Q(W s H)^T||^2``, activations per token, weights to nearest
    (arXiv 2506.01967).

    Args:
        sample: X, float32 ``(tokens, f)``.
        weight: W, float32 ``(hidden, f)``.
        scheme: of both quantisers.
        block: Hadamard block of R4, 0 for none.
    """

    sample: torch.Tensor
    weight: torch.Tensor
    scheme: LinearScheme
    block: int

    @torch.no_grad()
    def of(self, scales: torch.Tensor) -> float:
        """The error at scales s ``(f,)``, as the converter's own round-to-nearest leaves it."""
        x, w = self._smoothed(scales.float())
        return float(self._error(x, quantize_rtn(w, self.scheme.weights).dequantize()))

    @torch.no_grad()
    def shrink(self, scales: torch.Tensor) -> torch.Tensor:
        """Weight scales of the clip search at ``scales``, as fractions of the largest magnitude,
        ``(hidden, groups)``."""
        return searched_shrink(self._smoothed(scales.float())[1], self.scheme.weights)

    def differentiable(self, scales: torch.Tensor, shrink: torch.Tensor) -> torch.Tensor:
        """The error with a gradient in float32 ``scales (f,)``, straight through the rounding,
        for a given :meth:`shrink`."""
        x, w = self._smoothed(scales)
        return self._error(x, fake_quantize_shrunk(w, shrink, self.scheme.weights.bits))

    def _smoothed(self, scales: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x, w = self.sample / scales, self.weight * scales
        return (hadamard(x, self.block), hadamard(w, self.block)) if self.block else (x, w)

    def _error(self, x: torch.Tensor, quantized_weight: torch.Tensor) -> torch.Tensor:
        difference = (
            fake_quantize_tokens(x, self.scheme.activations) @ quantized_weight.T
            - self.sample @ self.weight.T
        )
        return difference.square().sum(dim=1).sum()
