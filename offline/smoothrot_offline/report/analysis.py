# SPDX-License-Identifier: Apache-2.0
"""The record of an analysis: what ``analysis.json`` holds, and what its layers say together."""

import statistics
from collections.abc import Sequence
from typing import Literal

from pydantic import BaseModel, ConfigDict

from smoothrot_offline.config import AnalysisConfig
from smoothrot_offline.output.manifest import CalibrationRecord


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class TransformRecord(_Record):
    """One transform of one input.

    Difficulty: unbiased standard deviation of the channel magnitudes (2-norms) of activations and
    weight. Error: ``||X W^T - Q(X) Q(W)^T||_F^2``, and its share of ``||X W^T||_F^2``. Bins: shares
    of the 16 codes -8 to 7, in ``peak_token_bins`` of the one token with the largest value.
    """

    activation_difficulty: float
    weight_difficulty: float
    error: float
    relative_error: float
    activation_bins: list[float]
    peak_token_bins: list[float]
    weight_bins: list[float]


class PeakRecord(_Record):
    """The largest ``|x|``; ``median`` is that of its sequence, ``ratio`` to it is None if that
    is zero."""

    magnitude: float
    sample: int
    position: int
    token: int
    channel: int
    median: float
    ratio: float | None


class InputRecord(_Record):
    """One input of one decoder layer: the linears that read it, its largest activation, its
    massive tokens, its transforms."""

    linears: list[str]
    peak: PeakRecord
    massive_tokens: int
    massive_positions: list[int]
    transforms: dict[str, TransformRecord]


class PolicyRecord(_Record):
    """One smoothing policy at one down_proj, with R4. ``selected``: its scales differ from those of
    max.

    ``statistic``, ``alpha`` and ``quantile`` are what the scales (or their start) are made of.
    ``converted_*``: the same error with the converter's quantizers, W4A4 rounded to nearest.
    """

    statistic: str
    alpha: float
    quantile: float | None
    scale_min: float
    scale_max: float
    scale_geometric_mean: float
    error: float
    relative_error: float
    ratio_to_max: float | None
    converted_error: float
    converted_ratio_to_max: float | None
    selected: bool


class LayerAnalysis(_Record):
    """One decoder layer."""

    index: int
    inputs: dict[str, InputRecord]
    policies: dict[str, PolicyRecord]


class MassiveRecord(_Record):
    """Massive activations of one kind of input: the largest, in which layer, and the layers that
    have massive tokens."""

    layer: int
    peak: PeakRecord
    massive_layers: list[int]


class PolicySummary(_Record):
    """One policy over the layers: mean error, its ratio to that of max, and the same over the
    layers it selects.

    ``converted_*``: with the converter's quantizers.
    """

    mean_error: float
    ratio_of_means: float | None
    selected_ratio: float | None
    converted_mean_error: float
    converted_ratio_of_means: float | None
    converted_selected_ratio: float | None
    selected_layers: list[int]


class Analysis(_Record):
    """The whole file.

    ``error_difficulty_correlation``: Pearson's, of error and activation difficulty over the layers
    without a massive token; None where fewer than three such layers differ.
    """

    analysis_version: Literal[1] = 1
    model: str
    architecture: str
    model_layers: int
    config: AnalysisConfig
    packages: dict[str, str]
    calibration: CalibrationRecord
    massive_ratio: float
    massive: dict[str, MassiveRecord]
    mean_error: dict[str, dict[str, float]]
    error_difficulty_correlation: dict[str, dict[str, float | None]]
    policies: dict[str, PolicySummary]
    layers: list[LayerAnalysis]


def massive_activations(layers: Sequence[LayerAnalysis], kind: str) -> MassiveRecord:
    """The largest activation of a kind of input, and the layers where a token is massive."""
    largest = max(layers, key=lambda layer: layer.inputs[kind].peak.magnitude)
    massive = [layer.index for layer in layers if layer.inputs[kind].massive_tokens]
    return MassiveRecord(
        layer=largest.index, peak=largest.inputs[kind].peak, massive_layers=massive
    )


def mean_errors(layers: Sequence[LayerAnalysis], kind: str) -> dict[str, float]:
    """Mean layer error by transform."""
    inputs = [layer.inputs[kind] for layer in layers]
    return {
        name: statistics.fmean(found.transforms[name].error for found in inputs)
        for name in inputs[0].transforms
    }


def correlations(layers: Sequence[LayerAnalysis], kind: str) -> dict[str, float | None]:
    """Pearson's correlation of layer error and activation difficulty by transform, layers with a
    massive token set aside."""
    inputs = [layer.inputs[kind] for layer in layers]
    ordinary = [found for found in inputs if not found.massive_tokens]
    return {name: _correlation(ordinary, name) for name in inputs[0].transforms}


def policy_summary(layers: Sequence[LayerAnalysis], policy: str) -> PolicySummary:
    """One policy over all the layers, and over those where its scales differ from those of max."""
    own = [layer.policies[policy] for layer in layers]
    reference = [layer.policies["max"] for layer in layers]
    selected = [number for number, found in enumerate(own) if found.selected]
    plain, converted = [found.error for found in own], [found.converted_error for found in own]
    max_plain, max_converted = (
        [found.error for found in reference],
        [found.converted_error for found in reference],
    )
    return PolicySummary(
        mean_error=statistics.fmean(plain),
        ratio_of_means=_ratio_over(range(len(layers)), plain, max_plain),
        selected_ratio=_ratio_over(selected, plain, max_plain),
        converted_mean_error=statistics.fmean(converted),
        converted_ratio_of_means=_ratio_over(range(len(layers)), converted, max_converted),
        converted_selected_ratio=_ratio_over(selected, converted, max_converted),
        selected_layers=[layers[number].index for number in selected],
    )


def ratio(numerator: float, denominator: float) -> float | None:
    """Their quotient, or None where there is none."""
    return numerator / denominator if denominator else None


def _ratio_over(
    numbers: Sequence[int], own: Sequence[float], reference: Sequence[float]
) -> float | None:
    return ratio(
        sum(own[number] for number in numbers), sum(reference[number] for number in numbers)
    )


def _correlation(inputs: Sequence[InputRecord], name: str) -> float | None:
    difficulties = [found.transforms[name].activation_difficulty for found in inputs]
    errors = [found.transforms[name].error for found in inputs]
    if len(inputs) < 3 or len(set(difficulties)) < 2 or len(set(errors)) < 2:
        return None
    return statistics.correlation(difficulties, errors)
