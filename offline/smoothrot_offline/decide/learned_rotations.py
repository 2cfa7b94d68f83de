# SPDX-License-Identifier: Apache-2.0
"""Learned rotations: orthogonal matrices for R1 and R2 of a smaller layer error than the Hadamard
ones they start from.

``C = (I - A)^-1 (I + A)`` with A skew turns a start ``Q`` to ``Q C``. SpinQuant (arXiv 2405.16406)
descends on the same manifold by Cayley steps of its own; here the transform is the parametrization
and the optimizer is plain Adam. The error is ``||X W^T - Q(X R) Q(W R)^T||^2 / ||X W^T||^2``: local
to a layer, as in KurTail (arXiv 2503.01483), whose kurtosis stands in for this very error (arXiv
2506.01967)."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from smoothrot_offline.rounding.rtn import (
    Shrink,
    fake_quantize_shrunk,
    fake_quantize_tokens,
    quantize_rtn,
    searched_shrink,
)
from smoothrot_offline.transform.rotation import DenseRotation
from smoothrot_vllm.format import ActivationScheme, WeightScheme


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


def better_of(
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


HELD_TOKENS = 4
"""One token in this many is held out of what is learned from."""

_LEAST_OUTPUT = torch.finfo(torch.float32).tiny


@torch.no_grad()
def rounded_error(
    x: torch.Tensor, weight: torch.Tensor, activations: ActivationScheme, weights: WeightScheme
) -> float:
    """The error of ``x (tokens, n)`` times ``weight (rows, n)``, both rotated, as the
    converter's round-to-nearest leaves it."""
    return float(_relative(x, weight, quantize_rtn(weight, weights).dequantize(), activations))


def differentiable_error(
    x: torch.Tensor,
    weight: torch.Tensor,
    shrink: Shrink,
    activations: ActivationScheme,
    weights: WeightScheme,
) -> torch.Tensor:
    """:func:`rounded_error` with a gradient straight through the rounding, for the scale search's
    ``shrink``."""
    return _relative(x, weight, fake_quantize_shrunk(weight, shrink, weights.bits), activations)


def _relative(
    x: torch.Tensor, weight: torch.Tensor, quantized: torch.Tensor, activations: ActivationScheme
) -> torch.Tensor:
    # Any one rotation of both leaves the exact product as it is: there is no gradient to follow in
    # it.
    exact = x.detach() @ weight.detach().T
    error = fake_quantize_tokens(x, activations) @ quantized.T - exact
    return error.square().sum() / exact.square().sum().clamp_min(_LEAST_OUTPUT)


def split_tokens(inputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The tokens of ``inputs (tokens, n)`` to learn from, and those held out."""
    held = torch.arange(len(inputs), device=inputs.device) % HELD_TOKENS == HELD_TOKENS - 1
    return inputs[~held], inputs[held]


HEAD_ANGLE = 0.05


def learn_head_rotations(
    inputs: torch.Tensor,
    output_weight: torch.Tensor,
    value_weight: torch.Tensor,
    start: torch.Tensor,
    *,
    activations: ActivationScheme,
    weights: WeightScheme,
    steps: int,
) -> Learned:
    """Orthogonal matrices near ``start`` with a smaller error of one attention block's values;
    ``start`` if none was found.

    The error is o_proj's relative layer error plus the relative rounding error of v_proj's weight,
    which o_proj reads in full. It is descended on by
    :func:`learn_turn`; one token in four is held out, and
    decides.

    Args:
        inputs: what o_proj reads before R2, float32 ``(tokens, heads * head_dim)``: concatenated
            query heads.
        output_weight: o_proj's, float32 ``(rows, heads * head_dim)``, before R2, after R1.
        value_weight: v_proj's, float32 ``(kv_heads * head_dim, d)``, before R2, after the norm fold
            and R1.
        start: orthogonal, float64 ``(kv_heads, head_dim, head_dim)``: ``rotate.head_matrices``.
        activations: scheme of o_proj's input.
        weights: scheme of both weights.
        steps: of Adam, each on all tokens; at least 1.

    Returns:
        Matrices ``(kv_heads, head_dim, head_dim)`` for
        :func:`~smoothrot_offline.transform.rotation.rotate_heads`.
    """
    group = inputs.shape[1] // len(value_weight)
    values = DenseRotation(start.float()).rotate(value_weight.T)
    outputs = _query_heads(start.float(), group).rotate(output_weight)
    trained, held = split_tokens(_query_heads(start.float(), group).rotate(inputs))
    value_shrink, output_shrink = (
        searched_shrink(values.T, weights),
        searched_shrink(outputs, weights),
    )

    def loss(turn: torch.Tensor, _step: int) -> torch.Tensor:
        heads, value = _query_heads(turn, group), DenseRotation(turn).rotate(values).T
        error = differentiable_error(
            heads.rotate(trained), heads.rotate(outputs), output_shrink, activations, weights
        )
        return error + _rounding(value, fake_quantize_shrunk(value, value_shrink, weights.bits))

    def held_out(turn: torch.Tensor) -> float:
        heads, value = _query_heads(turn, group), DenseRotation(turn).rotate(values).T
        error = rounded_error(heads.rotate(held), heads.rotate(outputs), activations, weights)
        return error + float(_rounding(value, quantize_rtn(value, weights).dequantize()))

    return better_of(start, learn_turn(loss, start, steps, HEAD_ANGLE), held_out)


def _query_heads(matrices: torch.Tensor, group: int) -> DenseRotation:
    """Each query head by the matrix of the value head it reads."""
    return DenseRotation(matrices.repeat_interleave(group, dim=0))


def _rounding(weight: torch.Tensor, quantized: torch.Tensor) -> torch.Tensor:
    return (quantized - weight).square().sum() / weight.square().sum().clamp_min(
        torch.finfo(weight.dtype).tiny
    )


RESIDUAL_ANGLE = 0.03
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

    Tokens and whole samples are held out of the descent and the result is kept only if the
    error on what was held out, weights rounded as the converter does, is smaller than at the start.

    Args:
        readers: one for each norm of each decoder layer, or some of them, in order.
        start: orthogonal, float64 ``(d, d)``: ``random_rotation(d, seed).matrix()``.
        activations, weights: the schemes of the readers.
        steps: of Adam, at least 1.
        seed: of the order in which the samples are visited.

    Returns:
        A matrix ``(d, d)`` for :class:`~smoothrot_offline.transform.rotation.DenseRotation`.
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

    return better_of(start, learn_turn(loss, start, steps, RESIDUAL_ANGLE), held_out)


def _visits(samples: int, steps: int, seed: int) -> list[list[int]]:
    """The samples of each step: ``BATCH`` of them, or all, every sample once before any is seen
    again."""
    size = min(BATCH, samples)
    generator = torch.Generator().manual_seed(seed)
    rounds = -(-steps * size // samples)
    sequence = torch.cat([torch.randperm(samples, generator=generator) for _ in range(rounds)])
    return sequence[: steps * size].reshape(steps, size).tolist()
