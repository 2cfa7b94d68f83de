# SPDX-License-Identifier: Apache-2.0
"""Descent on orthogonal matrices: ``C = (I - A)^-1 (I + A)`` with A skew, which turns a start ``Q``
to ``Q C``.

SpinQuant (arXiv 2405.16406) descends on the same manifold by Cayley steps of its own; here the
transform is the parametrisation and the optimiser is plain Adam.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Learned:
    """Orthogonal ``matrices``, float64 ``(..., n, n)``; the error on what was held out
    ``before``, at the start, and after."""

    matrices: torch.Tensor
    before: float
    after: float


def learn_turn(
    loss: Callable[[torch.Tensor, int], torch.Tensor], start: torch.Tensor, steps: int, angle: float
) -> torch.Tensor:
    """The orthogonal C found by Adam from the identity, its learning rate falling to zero along a
    cosine.

    Args:
        loss: of C, float32, at a step counted from 0; has a gradient in C.
        start: what C will turn, ``(..., n, n)``: C has its shape and device.
        steps: how many, at least 1.
        angle: learning rate in units of ``n^-1/2``: the first steps turn by at most about twice
            this many radians, whatever n.

    Returns:
        Float64, orthogonal as far as float64 is.
    """
    free = torch.zeros(start.shape, device=start.device, requires_grad=True)
    optimizer = torch.optim.Adam([free], lr=angle * start.shape[-1] ** -0.5)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for step in range(steps):
        optimizer.zero_grad()
        loss(cayley(free), step).backward()
        optimizer.step()
        schedule.step()
    return cayley(free.detach().double())


def keep_better(
    start: torch.Tensor, turn: torch.Tensor, held_out: Callable[[torch.Tensor], float]
) -> Learned:
    """``start C`` if its held-out error is less than that of ``start``, or else ``start`` itself.

    Args:
        start, turn: orthogonal, float64 ``(..., n, n)``; ``turn`` is C.
        held_out: the error of a float32 C.
    """
    identity = torch.eye(start.shape[-1], device=start.device)
    before, after = held_out(identity.expand_as(start)), held_out(turn.float())
    return (
        Learned(start @ turn, before, after) if after < before else Learned(start, before, before)
    )


def cayley(free: torch.Tensor) -> torch.Tensor:
    """``(I - A)^-1 (I + A)`` with ``A = (free - free^T) / 4``: orthogonal for any ``free (..., n,
    n)``, the identity for zero.

    Near zero a pair of entries ``free_ij = -free_ji`` is the angle of a turn in the plane of i and
    j.
    """
    skew = (free - free.mT) / 4
    identity = torch.eye(free.shape[-1], dtype=free.dtype, device=free.device)
    return torch.linalg.solve(identity - skew, identity + skew)
