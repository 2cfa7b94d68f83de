# SPDX-License-Identifier: Apache-2.0
"""Second moments of a linear's run-time input: what error-compensated rounding needs to know of the calibration data."""

from dataclasses import dataclass
from itertools import pairwise

import torch

from smoothrot_vllm.errors import CheckpointError


@dataclass
class Moments:
    """Sums over so many tokens of ``x^T x`` and, if asymmetric, ``(x~ - x)^T x``, float64 ``(channels, channels)``."""

    tokens: int
    squares: torch.Tensor
    products: torch.Tensor | None

    def add(self, x: torch.Tensor, full_precision: torch.Tensor | None) -> None:
        """Add float32 ``x (tokens, channels)`` and its full-precision counterpart."""
        self.tokens += len(x)
        self.squares += x.T @ x
        if self.products is not None:
            assert full_precision is not None
            self.products += (full_precision - x).T @ x

    @property
    def hessian(self) -> torch.Tensor:
        """``H = mean_t x_t^T x_t``."""
        return self.squares / max(1, self.tokens)

    @property
    def cross(self) -> torch.Tensor:
        """``C = mean_t (x~_t - x_t)^T x_t`` of asymmetric calibration."""
        assert self.products is not None
        return self.products / max(1, self.tokens)


class HessianAccumulator:
    """:class:`Moments` of the calibration tokens, added a batch at a time.

    ``x`` is what the quantised linear reads at run time: smoothed, rotated, quantised and dequantised. ``x~`` is what the
    full-precision model has there, in the same smoothed and rotated basis. For asymmetric calibration the tokens are kept in two
    halves, the first and the second of each batch: what is fitted to one can be judged by the other.

    Args:
        channels: inputs of the linear.
        asymmetric: gather C too; then every batch needs its full-precision counterpart.
    """

    def __init__(self, channels: int, asymmetric: bool = False) -> None:
        def empty() -> torch.Tensor:
            return torch.zeros(channels, channels, dtype=torch.float64)

        self.halves = [Moments(0, empty(), empty() if asymmetric else None) for _ in range(2 if asymmetric else 1)]

    def add(self, x: torch.Tensor, full_precision: torch.Tensor | None = None) -> None:
        """Add tokens ``x (..., channels)``, float32, and what the full-precision model has for the same tokens.

        Raises:
            CheckpointError: an input is NaN or infinite.
        """
        x = x.flatten(0, -2).float()
        target = None if full_precision is None else full_precision.flatten(0, -2).float()
        if not x.isfinite().all() or (target is not None and not target.isfinite().all()):
            raise CheckpointError(
                "calibration: expected finite activations, got a NaN or an infinity. "
                "Check the source weights with `smoothrot-convert plan`, and the calibration text."
            )
        bounds = [0, len(x) // 2, len(x)] if len(self.halves) == 2 else [0, len(x)]
        for half, (start, end) in zip(self.halves, pairwise(bounds), strict=True):
            half.add(x[start:end], None if target is None else target[start:end])

    @property
    def tokens(self) -> int:
        """How many were added."""
        return sum(half.tokens for half in self.halves)

    def total(self) -> Moments:
        """Of all tokens."""
        first, *rest = self.halves
        if not rest:
            return first
        (second,) = rest
        assert first.products is not None
        assert second.products is not None
        return Moments(self.tokens, first.squares + second.squares, first.products + second.products)
