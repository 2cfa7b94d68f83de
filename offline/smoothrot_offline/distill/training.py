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

if TYPE_CHECKING:  # what a plan needs of this file is quick to import
    from transformers import PreTrainedModel

    from smoothrot_offline.distill.student import Student

BATCH = 4
"""Sequences of a step."""
HELD_OUT = 8
"""Sequences that decide whether the result is kept; of a text they may overlap the others."""
MOST_SEQUENCES = 512
"""Of a text."""
SCALE_RATE = 2e-3
"""Of Adam, for the logarithm of a scale."""
VECTOR_RATE = 3e-3
WARM_UP = 5
_BETAS = (0.9, 0.95)
_LOSS_ROWS = 512


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
        divergence(original, student.model, tokens[chosen]).backward()
        optimizer.step()
        schedule.step()
    student.round_vectors()


def divergence(
    original: PreTrainedModel, student: PreTrainedModel, tokens: torch.Tensor
) -> torch.Tensor:
    """Mean ``KL(original || student)`` of the next token, in nats; ``tokens (samples, seqlen)``."""
    with torch.no_grad():
        wanted = original(tokens, use_cache=False).logits.flatten(0, 1)
    found = student(tokens, use_cache=False).logits.flatten(0, 1)
    parts = [
        torch.nn.functional.kl_div(
            given.log_softmax(-1), target.log_softmax(-1), reduction="sum", log_target=True
        )
        for given, target in zip(found.split(_LOSS_ROWS), wanted.split(_LOSS_ROWS), strict=True)
    ]
    return torch.stack(parts).sum() / len(found)


@torch.no_grad()
def held_out_divergence(
    original: PreTrainedModel, student: PreTrainedModel, tokens: torch.Tensor
) -> float:
    """:func:`divergence` a sequence at a time."""
    return sum(float(divergence(original, student, one[None])) for one in tokens) / len(tokens)
