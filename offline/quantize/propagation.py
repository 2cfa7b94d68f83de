# SPDX-License-Identifier: Apache-2.0
"""Asymmetric calibration: the weight whose rounding aims at the full-precision model's outputs, not those of its own inputs."""

import torch

from smoothrot_offline.quantize.hessian import HessianAccumulator, Moments

RIDGES = (0.003, 0.03, 0.3, 3.0)
"""Tried, as fractions of the mean diagonal of H."""
JUDGED_ROWS = 256
"""Of the weight; the ridge and the share are chosen by so many."""


def asymmetric_target(weight: torch.Tensor, statistics: HessianAccumulator) -> torch.Tensor:
    """``W* = W + a W C (H + r I)^-1``, which is to be rounded in place of W; ``(N, K)``, float64 unless it is W itself.

    Of ``|W x~ - Q x|^2``, ``W C (H + r I)^-1`` with ``r = 0`` is the least-squares change of W, and any Q then adds exactly
    ``tr((W* - Q) H (W* - Q)^T)`` (asymmetric calibration: GPTAQ, arXiv 2504.02692; Qronos, arXiv 2505.11695). Fitted to some ten
    thousand tokens it follows their noise as well, by how much differs from linear to linear. So the ridge r and the share a (of
    which GPTAQ takes a quarter everywhere) are those that leave the least error in the half of the tokens to which they were not
    fitted, either half in either part. Nothing is changed where no change helps there, or where a half has no tokens.

    Args:
        weight: W ``(N, K)``, any float dtype, in the basis of the run-time input.
        statistics: an asymmetric accumulator of the linear's input.
    """
    rows = weight[:: max(1, weight.shape[0] // JUDGED_ROWS)].double()
    first, second = statistics.halves
    if not (first.tokens and second.tokens and first.squares.any() and second.squares.any()):
        return weight
    best_gain, best_share, best_ridge = 0.0, 0.0, 0.0
    for ridge in RIDGES:
        share, gain = _judged([(rows, first, second), (rows, second, first)], ridge)
        if gain > best_gain:
            best_gain, best_share, best_ridge = gain, share, ridge
    if not best_gain:
        return weight
    return weight.double() + best_share * _change(weight.double(), statistics.total(), best_ridge)


def _judged(folds: list[tuple[torch.Tensor, Moments, Moments]], ridge: float) -> tuple[float, float]:
    """The best share of the changes fitted to one half, and what it takes off the squared error of the other."""
    along = squared = 0.0
    for rows, fitted, unseen in folds:
        change = _change(rows, fitted, ridge)
        along += float(((rows @ unseen.cross) * change).sum())
        squared += float(((change @ unseen.hessian) * change).sum())
    share = min(1.0, max(0.0, along / squared)) if squared > 0 else 0.0
    return share, share * (2 * along - share * squared)


def _change(rows: torch.Tensor, moments: Moments, ridge: float) -> torch.Tensor:
    """``W C (H + r I)^-1`` for some rows of W."""
    damped = moments.hessian
    damped.diagonal().add_(ridge * damped.diagonal().mean())
    return torch.cholesky_solve((rows @ moments.cross).T, torch.linalg.cholesky(damped)).T
