# SPDX-License-Identifier: Apache-2.0
"""``KL(original || student)`` of the next token, with a gradient in the student's logits."""

from typing import Any

import torch

_ROWS = 128


class _Divergence(torch.autograd.Function):
    """The gradient, ``softmax(found) - softmax(wanted)``, is formed with the value, a few tokens at
    a time: logits are what takes most memory of all."""

    @staticmethod
    def forward(context: Any, found: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
        total = torch.zeros((), device=found.device)
        gradient = torch.empty_like(found)
        for rows, given, target in zip(
            gradient.split(_ROWS), found.split(_ROWS), wanted.split(_ROWS), strict=True
        ):
            log_given, log_target = (x.float().log_softmax(-1) for x in (given, target))
            probability = log_target.exp()
            total += (log_target.sub_(log_given).mul_(probability)).sum()
            rows.copy_(log_given.exp_().sub_(probability))
        context.save_for_backward(gradient)
        return total / len(found)

    @staticmethod
    def backward(context: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (gradient,) = context.saved_tensors
        return gradient * (gradients[0] / len(gradient)), None


def divergence(found: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """Mean over tokens of ``KL(softmax(wanted) || softmax(found))``, in nats.

    Args:
        found: logits ``(T, vocabulary)``; it alone has a gradient.
        wanted: logits of the same shape.
    """
    mean: torch.Tensor = _Divergence.apply(found, wanted)
    return mean
