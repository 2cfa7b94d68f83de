# SPDX-License-Identifier: Apache-2.0
"""What the measured layers say together: massive activations, mean errors, correlations, and the
policies against max."""

import statistics
from collections.abc import Sequence

from smoothrot_offline.analysis.record import (
    InputRecord,
    LayerAnalysis,
    MassiveRecord,
    PolicySummary,
)


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
