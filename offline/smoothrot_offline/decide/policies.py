# SPDX-License-Identifier: Apache-2.0
"""Which smoothing scales even out down_proj's input before R4: from statistics, by trying them out
on the layer error, or by gradient on it (after arXiv 2606.09927)."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch

from smoothrot_offline import ranks
from smoothrot_offline.config import Policy
from smoothrot_offline.rounding.rtn import (
    Shrink,
    fake_quantize_shrunk,
    fake_quantize_tokens,
    quantize_rtn,
    searched_shrink,
)
from smoothrot_offline.source.family import ModelSpec
from smoothrot_offline.transform.rotation import hadamard
from smoothrot_vllm.format import LinearScheme

SAMPLE_TOKENS = 2048


class InputStatistics:
    """Per-channel magnitudes of a linear's input ``X (tokens, channels)``, and a sample of its
    tokens.

    ``largest`` is ``max_t |X_tj|``, float32 ``(channels,)``; ``norm`` is ``||X_j||_2``, float64
    ``(channels,)``; ``tokens`` counts what was seen. ``sample`` holds every ``stride``-th token, so
    that rare tokens (the massive one at the start of a sequence) are in it as often as in the text.

    Args:
        channels: width of the input.
        expected_tokens: how many tokens will be shown in all, to all ranks; some ``SAMPLE_TOKENS``
            of them are kept.
        device: that of the tokens.
        seqlen: tokens of a sequence, of which each rank is shown whole ones; None if it is shown
            some of them, as experts are.
    """

    def __init__(
        self,
        channels: int,
        expected_tokens: int,
        device: torch.device | None = None,
        seqlen: int | None = None,
    ) -> None:
        self.largest = torch.zeros(channels, device=device)
        self.tokens = 0
        # An odd stride meets every position of sequences whose length is a power of two.
        self.stride = max(1, expected_tokens // SAMPLE_TOKENS) | 1
        self._squares = torch.zeros(channels, dtype=torch.float64, device=device)
        self._seqlen = seqlen
        self._kept = [torch.empty(0, channels, device=device)]

    def update(self, x: torch.Tensor) -> None:
        """Add the tokens of float32 ``x (tokens, channels)``."""
        self.largest = torch.maximum(self.largest, x.abs().amax(dim=0))
        self._squares += x.square().sum(dim=0, dtype=torch.float64)
        seen = torch.arange(self.tokens, self.tokens + x.shape[0])
        place = seen if self._seqlen is None else ranks.places(seen, self._seqlen)
        self._kept.append(x[(place % self.stride == 0).to(x.device)])
        self.tokens += x.shape[0]

    def reduce(self) -> None:
        """Take in what the other ranks have seen."""
        ranks.keep_largest(self.largest)
        ranks.add(self._squares)
        (tokens,) = ranks.summed(self.tokens)
        self.tokens = int(tokens)
        self._kept = [ranks.joined(self.sample)]

    @property
    def norm(self) -> torch.Tensor:
        """``||X_j||_2`` over all tokens, float64 ``(channels,)``."""
        return self._squares.sqrt()

    @property
    def sample(self) -> torch.Tensor:
        """Float32 ``(sampled tokens, channels)``."""
        return torch.cat(self._kept)

    def quantile(self, q: float) -> torch.Tensor:
        """The q-quantile of ``|X_j|`` over the sampled tokens, float32 ``(channels,)``: the
        nearest token at or above it."""
        sample = self.sample
        return sample.abs().kthvalue(max(1, math.ceil(q * len(sample))), dim=0).values

    def sampled(self, rows: torch.Tensor) -> torch.Tensor:
        """Those rows of a tensor ``(tokens, ...)`` that belong to the tokens of :attr:`sample`."""
        return rows[:: self.stride]


@dataclass(frozen=True)
class LayerError:
    """``sum_t ||x_t W^T - Q(x_t / s H) Q(W s H)^T||^2``, activations per token, weights to nearest
    (arXiv 2506.01967).

    Args:
        sample: X, float32 ``(tokens, f)``.
        weight: W, float32 ``(hidden, f)``.
        scheme: of both quantizers.
        block: Hadamard block of R4, 0 for none.
    """

    sample: torch.Tensor
    weight: torch.Tensor
    scheme: LinearScheme
    block: int

    @torch.no_grad()
    def of(self, scales: torch.Tensor) -> float:
        """The error at scales s ``(f,)``, as the converter's own round-to-nearest leaves it."""
        x, w = self._smoothed(scales.float())
        return float(self._error(x, quantize_rtn(w, self.scheme.weights).dequantize()))

    @torch.no_grad()
    def shrink(self, scales: torch.Tensor) -> Shrink:
        """Weight scales of the search at ``scales``, as fractions of the largest magnitudes."""
        return searched_shrink(self._smoothed(scales.float())[1], self.scheme.weights)

    def differentiable(self, scales: torch.Tensor, shrink: Shrink) -> torch.Tensor:
        """The error with a gradient in float32 ``scales (f,)``, straight through the rounding,
        for a given :meth:`shrink`."""
        x, w = self._smoothed(scales)
        return self._error(x, fake_quantize_shrunk(w, shrink, self.scheme.weights.bits))

    def _smoothed(self, scales: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x, w = self.sample / scales, self.weight * scales
        return (hadamard(x, self.block), hadamard(w, self.block)) if self.block else (x, w)

    def _error(self, x: torch.Tensor, quantized_weight: torch.Tensor) -> torch.Tensor:
        difference = (
            fake_quantize_tokens(x, self.scheme.activations) @ quantized_weight.T
            - self.sample @ self.weight.T
        )
        return difference.square().sum(dim=1).sum()


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


Statistic = Literal["max", "quantile", "l2"]

SEARCHED_ALPHAS = (0.4, 0.5, 0.6)
SEARCHED_QUANTILES = (0.99, 0.999)


@dataclass(frozen=True)
class PolicyOptions:
    """``alpha`` of the fixed policies (max, quantile) and ``quantile`` of the second."""

    alpha: float = 0.5
    quantile: float = 0.999


@dataclass(frozen=True)
class SmoothingChoice:
    """Scales, float64 ``(f,)``, positive and finite, and how they came about.

    ``start`` are the scales that learning began from (None unless the policy learns); ``error`` is
    the layer error relative to that of the max policy with alpha 0.5.
    """

    scales: torch.Tensor
    statistic: Statistic
    alpha: float
    quantile: float | None
    error: float
    start: torch.Tensor | None = None


def choose_scales(
    policy: Policy, statistics: InputStatistics, error: LayerError, options: PolicyOptions
) -> SmoothingChoice:
    """Scales of one down_proj by one policy.

    ``max``: ``s_j = max|X_j|^a / max|W_j|^(1-a)`` (SmoothRot, arXiv 2506.05413, equation 4; the
    paper's code takes the signed maximum of W). ``quantile``: a quantile of ``|X_j|`` in place of
    its maximum (arXiv 2606.09927). ``l2``: ``s_j = (||X_j|| / ||W_j||)^(1/2)`` (arXiv 2609.21450);
    after a rotation the error of both quantizers grows with ``||X/s||^2 ||W s||^2``, which these
    scales make least. ``search``: whichever statistic and alpha leave the least layer error (after
    arXiv 2606.09927, with the norm beside the quantiles). ``learned``: from there by gradient, see
    :func:`learn_scales`.

    Args:
        policy: which.
        statistics: of down_proj's input X ``(tokens, f)`` in the original model.
        error: of this layer, with its weight W ``(hidden, f)`` before any fold.
        options: numbers that a policy does not choose itself.
    """
    reference = error.of(_scales("max", statistics, error.weight, 0.5, None))
    candidates: list[tuple[Statistic, float, float | None]]
    match policy:
        case "max":
            candidates = [("max", options.alpha, None)]
        case "quantile":
            candidates = [("quantile", options.alpha, options.quantile)]
        case "l2":
            candidates = [("l2", 0.5, None)]
        case _:
            candidates = list(_grid())
    tried = [
        (error.of(_scales(s, statistics, error.weight, a, q)), s, a, q) for s, a, q in candidates
    ]
    least, statistic, alpha, quantile = min(tried, key=lambda candidate: candidate[0])
    scales = _scales(statistic, statistics, error.weight, alpha, quantile)
    start = None
    if policy == "learned":
        # Without an error, as of a linear of zeros, there is nothing to learn from.
        start, (scales, least) = (
            scales,
            (learn_scales(scales, least, error) if least > 0 else (scales, least)),
        )
    relative = least / reference if reference else 1.0
    return SmoothingChoice(scales, statistic, alpha, quantile, relative, start)


def policy_flop(spec: ModelSpec, policy: Policy, tokens: int) -> float:
    """Floating-point operations of choosing the scales of all layers from ``tokens`` tokens."""
    searched = len(list(_grid()))
    trials = {"search": searched, "learned": searched + 3 * STEPS}.get(policy, 2)
    sampled = min(tokens, SAMPLE_TOKENS)
    chosen = spec.config.num_experts_per_tok if spec.experts else 0
    routed = min(tokens * chosen // max(1, spec.experts), SAMPLE_TOKENS)
    products = 0
    for index in range(spec.layers):
        widths, experts = spec.down_widths(index), spec.experts_in(index)
        products += routed * sum(widths[:experts]) + sampled * sum(widths[experts:])
    return trials * products * 2 * spec.hidden


def _grid() -> Iterator[tuple[Statistic, float, float | None]]:
    for alpha in SEARCHED_ALPHAS:
        yield "max", alpha, None
        yield "l2", alpha, None
        for quantile in SEARCHED_QUANTILES:
            yield "quantile", alpha, quantile


def _scales(
    statistic: Statistic,
    statistics: InputStatistics,
    weight: torch.Tensor,
    alpha: float,
    quantile: float | None,
) -> torch.Tensor:
    """``a_j^alpha / w_j^(1 - alpha)``; 1 for a channel that is zero in the weight or was never
    seen non-zero."""
    if statistic == "l2":
        activation, columns = statistics.norm, weight.double().norm(dim=0)
    else:
        activation = statistics.largest if quantile is None else statistics.quantile(quantile)
        activation, columns = activation.double(), weight.double().abs().amax(dim=0)
    scales = activation.pow(alpha) / columns.pow(1 - alpha)
    return torch.where((activation > 0) & (columns > 0), scales, 1.0)
