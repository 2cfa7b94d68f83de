# SPDX-License-Identifier: Apache-2.0
"""Smoothing scales by gradient descent on the layer error, straight through both quantisers
(after arXiv 2606.09927)."""

import math

import torch

from smoothrot_offline.smooth.layer_error import LayerError

STEPS = 40
LEARNING_RATE = 0.1
BOUND = math.log(2.0)
"""A learned scale stays within this factor of its start, either way: the calibration text cannot
carry it off."""


def learn_scales(
    start: torch.Tensor, start_error: float, error: LayerError
) -> tuple[torch.Tensor, float]:
    """Scales near ``start`` with a smaller layer error, and that error; ``start`` itself if none
    was found.

    ``log s = log start + BOUND tanh(theta)``, theta by Adam with a cosine schedule. Whatever s is,
    it is divided out of up_proj and multiplied into down_proj, so the layer's function is kept
    exactly.

    Args:
        start: float64 ``(f,)``, positive.
        start_error: ``error.of(start)``.
        error: the layer's.

    Returns:
        Float64 ``(f,)`` and the layer error there, as round-to-nearest leaves it.
    """
    logarithm = start.log().float()
    theta = torch.zeros_like(logarithm, requires_grad=True)
    optimizer = torch.optim.Adam([theta], lr=LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    shrink = error.shrink(start)
    for _ in range(STEPS):
        loss = error.differentiable((logarithm + BOUND * theta.tanh()).exp(), shrink)
        optimizer.zero_grad()
        (loss / start_error).backward()
        optimizer.step()
        schedule.step()
    learned = start * (BOUND * theta.detach().double().tanh()).exp()
    learned_error = error.of(learned)
    return (learned, learned_error) if learned_error < start_error else (start, start_error)
