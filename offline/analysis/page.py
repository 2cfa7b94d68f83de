# SPDX-License-Identifier: Apache-2.0
"""``report.html`` of an analysis."""

from collections.abc import Mapping

from smoothrot_offline.analysis import pictures
from smoothrot_offline.analysis.pictures import LayerPictures
from smoothrot_offline.analysis.record import Analysis, LayerAnalysis
from smoothrot_offline.analysis.transforms import DOWN, TRANSFORMS
from smoothrot_offline.page import embedded, render


def analysis_page(analysis: Analysis, layer_pictures: Mapping[int, LayerPictures]) -> str:
    """The whole page; ``layer_pictures`` are by layer."""
    shown = pictured_layers(analysis)
    scatter = [(layer.index, layer_pictures[layer.index]) for layer in shown]
    learned = all(found.learned is not None for _, found in scatter)
    return render(
        "analysis.html.jinja",
        analysis=analysis,
        transforms=TRANSFORMS,
        down=DOWN,
        pictured=[
            (
                layer.index,
                embedded(
                    pictures.surfaces(layer, layer_pictures[layer.index]),
                    f"surfaces of layer {layer.index}",
                ),
                embedded(pictures.bins(layer), f"occupied bins of layer {layer.index}"),
            )
            for layer in shown
        ],
        activation_difficulty=embedded(
            pictures.by_layer(
                analysis, lambda found: found.activation_difficulty, "activation difficulty"
            ),
            "activation difficulty by layer",
        ),
        weight_difficulty=embedded(
            pictures.by_layer(analysis, lambda found: found.weight_difficulty, "weight difficulty"),
            "weight difficulty by layer",
        ),
        error=embedded(
            pictures.by_layer(analysis, lambda found: found.error, "layer error"),
            "layer error by layer",
        ),
        ratios=(
            embedded(pictures.policy_ratios(analysis), "policies against max")
            if len(analysis.policies) > 1
            else None
        ),
        learned=(
            embedded(pictures.learned_against_start(scatter), "learned against start scales")
            if learned
            else None
        ),
    )


def pictured_layers(analysis: Analysis) -> list[LayerAnalysis]:
    """The layer with down_proj's largest activation, and an ordinary one: of the others, the one
    whose largest is the median."""
    largest = analysis.massive[DOWN].layer
    others = sorted(
        (layer for layer in analysis.layers if layer.index != largest),
        key=lambda layer: layer.inputs[DOWN].peak.magnitude,
    )
    extreme = [layer for layer in analysis.layers if layer.index == largest]
    return extreme + others[(len(others) - 1) // 2 :][:1]
