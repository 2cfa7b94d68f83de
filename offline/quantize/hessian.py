# SPDX-License-Identifier: Apache-2.0
"""Second moments of a linear's run-time input: what error-compensated rounding needs to know of
the calibration data."""

import torch

from smoothrot_vllm.errors import CheckpointError


class HessianAccumulator:
    """``H = mean_t x_t^T x_t`` and, for asymmetric calibration, ``C = mean_t (x~_t - x_t)^T x_t``,
    added a batch at a time.

    ``x`` is what the quantised linear reads at run time: smoothed, rotated, quantised and
    dequantised. ``x~`` is what the full-precision model has there, in the same smoothed and rotated
    basis.

    Args:
        channels: inputs of the linear.
        asymmetric: accumulate C too; then every batch needs its full-precision counterpart.
        device: that of the batches.
    """

    def __init__(
        self, channels: int, asymmetric: bool = False, device: torch.device | None = None
    ) -> None:
        self._tokens = 0
        self._hessian = torch.zeros(channels, channels, dtype=torch.float64, device=device)
        self._cross = torch.zeros_like(self._hessian) if asymmetric else None

    def add(self, x: torch.Tensor, full_precision: torch.Tensor | None = None) -> None:
        """Add tokens ``x (..., channels)``, float32, and what the full-precision model has for the
        same tokens.

        Raises:
            CheckpointError: an input is NaN or infinite.
        """
        x = x.flatten(0, -2).float()
        if not x.isfinite().all():
            raise CheckpointError(
                "calibration: expected finite activations, got a NaN or an infinity. "
                "Check the source weights with `smoothrot-convert plan`, and the calibration text."
            )
        self._tokens += x.shape[0]
        self._hessian += x.T @ x
        if self._cross is not None:
            assert full_precision is not None
            self._cross += (full_precision.flatten(0, -2).float() - x).T @ x

    @property
    def tokens(self) -> int:
        """How many were added."""
        return self._tokens

    @property
    def hessian(self) -> torch.Tensor:
        """H, float64 ``(channels, channels)``."""
        return self._hessian / max(1, self._tokens)

    @property
    def cross(self) -> torch.Tensor | None:
        """C, float64 ``(channels, channels)``, or None for a symmetric accumulator."""
        return None if self._cross is None else self._cross / max(1, self._tokens)
