# SPDX-License-Identifier: Apache-2.0
"""R1 learned: one orthogonal matrix of the residual stream, for every linear that reads it
through a norm."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from smoothrot_offline.quantize.straight_through import searched_shrink
from smoothrot_offline.rotations.cayley import Learned, keep_better, learn_turn
from smoothrot_offline.rotations.product_error import (
    differentiable_error,
    rounded_error,
    split_tokens,
)
from smoothrot_vllm.format import ActivationScheme, WeightScheme

ANGLE = 0.03
BATCH = 8
"""Samples that one step looks at."""
HELD_SAMPLES = 8
"""One sample in this many is held out whole."""


@dataclass(frozen=True)
class ReaderSample:
    """What the linears behind one norm multiply, norm folded, nothing rotated.

    Args:
        inputs: float32 ``(tokens, d)``, the norm's output without its weight, so of unit root mean
            square.
        weight: float32 ``(rows, d)``, rows of the linears that read it, times the norm's weight. A
            sample of the rows will do.
    """

    inputs: torch.Tensor
    weight: torch.Tensor


def learn_residual_rotation(
    readers: Sequence[ReaderSample],
    start: torch.Tensor,
    *,
    activations: ActivationScheme,
    weights: WeightScheme,
    steps: int,
    seed: int = 0,
) -> Learned:
    """An orthogonal matrix near ``start`` with a smaller mean relative layer error of the readers;
    ``start`` if none was found.

    Tokens and whole samples are held out of the descent (see
    :mod:`~smoothrot_offline.rotations.cayley` for its sources), and the result is kept only if the
    error on what was held out, weights rounded as the converter does, is smaller than at the start.

    Args:
        readers: one for each norm of each decoder layer, or some of them, in order.
        start: orthogonal, float64 ``(d, d)``: ``random_rotation(d, seed).matrix()``.
        activations, weights: the schemes of the readers.
        steps: of Adam, at least 1.
        seed: of the order in which the samples are visited.

    Returns:
        A matrix ``(d, d)`` for :class:`~smoothrot_offline.rotate.DenseRotation`.
    """
    basis = start.float()
    samples = [ReaderSample(reader.inputs @ basis, reader.weight @ basis) for reader in readers]
    trained = [s for i, s in enumerate(samples) if (i + 1) % HELD_SAMPLES]
    inputs = [split_tokens(sample.inputs)[0] for sample in trained]
    shrinks = [searched_shrink(sample.weight, weights) for sample in trained]
    order = _visits(len(trained), steps, seed)

    def loss(turn: torch.Tensor, step: int) -> torch.Tensor:
        errors = [
            differentiable_error(
                inputs[i] @ turn, trained[i].weight @ turn, shrinks[i], activations, weights
            )
            for i in order[step]
        ]
        return torch.stack(errors).mean()

    def held_out(turn: torch.Tensor) -> float:
        errors = []
        for index, sample in enumerate(samples):
            kept_back = (
                split_tokens(sample.inputs)[1] if (index + 1) % HELD_SAMPLES else sample.inputs
            )
            errors.append(
                rounded_error(kept_back @ turn, sample.weight @ turn, activations, weights)
            )
        return sum(errors) / len(errors)

    return keep_better(start, learn_turn(loss, start, steps, ANGLE), held_out)


def _visits(samples: int, steps: int, seed: int) -> list[list[int]]:
    """The samples of each step: ``BATCH`` of them, or all, every sample once before any is seen
    again."""
    size = min(BATCH, samples)
    generator = torch.Generator().manual_seed(seed)
    rounds = -(-steps * size // samples)
    sequence = torch.cat([torch.randperm(samples, generator=generator) for _ in range(rounds)])
    return sequence[: steps * size].reshape(steps, size).tolist()
