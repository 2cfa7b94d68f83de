# SPDX-License-Identifier: Apache-2.0
"""The scale policies: which scales s even out down_proj's input before R4, from statistics or by
trying them out."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch

from smoothrot_offline.smooth.layer_error import LayerError
from smoothrot_offline.smooth.learned import learn_scales
from smoothrot_offline.smooth.statistics import InputStatistics

Policy = Literal["max", "quantile", "l2", "search", "learned"]
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
    after a rotation the error of both quantisers grows with ``||X/s||^2 ||W s||^2``, which these
    scales make least. ``search``: whichever statistic and alpha leave the least layer error (after
    arXiv 2606.09927, with the norm beside the quantiles). ``learned``: from there by gradient, see
    :func:`~smoothrot_offline.smooth.learned.learn_scales`.

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


def searched_candidates() -> int:
    """How many scales ``search`` tries."""
    return len(list(_grid()))


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
