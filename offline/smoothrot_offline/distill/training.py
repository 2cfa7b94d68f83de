# SPDX-License-Identifier: Apache-2.0
"""Distillation: the rounded model's scales, norms and biases trained together to predict what the
original predicts.

Rounding minimizes the error of a layer, which does not order models. Here the loss is the model's
own, ``KL(original || rounded)`` of the next token; the rounding of activations passes the gradient
straight through. Codes stay, and what is trained is stored anyway, so nothing is added at run time
(EfficientQAT, arXiv 2407.11062, second phase; QuIP#, arXiv 2402.04396, section 5).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from smoothrot_offline.distill.cost import BATCH
from smoothrot_offline.distill.divergence import divergence
from smoothrot_offline.distill.student import Student, logits

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SCALE_RATE = 2e-3
"""Of Adam, for the logarithm of a scale."""
VECTOR_RATE = 3e-3
WARM_UP = 5
_BETAS = (0.9, 0.95)


def train(
    original: PreTrainedModel,
    student: Student,
    tokens: torch.Tensor,
    steps: int,
    seed: int,
    step: Callable[[str], None],
) -> None:
    """Train in place.

    Args:
        original: the 16-bit model in float32.
        student: starts as the rounding left it.
        tokens: int64 ``(samples, seqlen)``.
        steps: of Adam, each on ``BATCH`` sequences.
        seed: of their order.
        step: told of each.
    """
    optimizer = torch.optim.Adam(
        [
            {"params": student.log_scales(), "lr": SCALE_RATE},
            {"params": student.vectors(), "lr": VECTOR_RATE},
        ],
        betas=_BETAS,
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda i: min(1.0, (i + 1) / WARM_UP) * (1 + math.cos(math.pi * i / steps)) / 2,
    )
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(tokens), generator=generator)
    for number in range(steps):
        step(f"distilling, step {number + 1} of {steps}")
        chosen = order[torch.arange(number * BATCH, (number + 1) * BATCH) % len(order)]
        optimizer.zero_grad()
        # One by one: what a sequence leaves for the way back is most of the memory.
        for one in tokens[chosen].split(1):
            (student_divergence(original, student, one) / BATCH).backward()
        optimizer.step()
        schedule.step()
    student.round_vectors()


def student_divergence(
    original: PreTrainedModel, student: Student, tokens: torch.Tensor
) -> torch.Tensor:
    """Mean ``KL(original || student)`` of the next token, in nats; ``tokens (samples, seqlen)``."""
    with torch.no_grad():
        wanted = logits(original, tokens, student.products)
    return divergence(student.logits(tokens), wanted)


@torch.no_grad()
def held_out_divergence(original: PreTrainedModel, student: Student, tokens: torch.Tensor) -> float:
    """:func:`student_divergence` of all sequences."""
    parts = [float(student_divergence(original, student, one)) for one in tokens.split(1)]
    return sum(parts) / len(parts)
