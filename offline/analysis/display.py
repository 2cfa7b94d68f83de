# SPDX-License-Identifier: Apache-2.0
"""An analysis as tables for people."""

from rich.console import Group, RenderableType

from smoothrot_offline.analysis.record import Analysis
from smoothrot_offline.analysis.transforms import DOWN, TRANSFORMS
from smoothrot_offline.display import make_table


def show_analysis(found: Analysis, out: str) -> RenderableType:
    """Massive activations, mean errors, down_proj layer by layer, and the policies against max."""
    massive = make_table(
        "input of",
        "largest |x|",
        "layer",
        "token",
        "channel",
        "/ median",
        "massive tokens in layers",
    )
    for kind, record in found.massive.items():
        peak = record.peak
        massive.add_row(
            kind,
            f"{peak.magnitude:.4g}",
            str(record.layer),
            str(peak.position),
            str(peak.channel),
            _number(peak.ratio, ".0f"),
            ", ".join(map(str, record.massive_layers)) or "none",
        )
    errors = make_table("mean error", *TRANSFORMS)
    for kind, by_transform in found.mean_error.items():
        errors.add_row(kind, *(_number(by_transform.get(name), ".4g") for name in TRANSFORMS))
    difficulties, layers = (make_table(f"{DOWN} layer", *TRANSFORMS) for _ in range(2))
    for layer in found.layers:
        records = layer.inputs[DOWN].transforms
        difficulties.add_row(
            str(layer.index), *(f"{records[name].activation_difficulty:.4g}" for name in TRANSFORMS)
        )
        layers.add_row(str(layer.index), *(f"{records[name].error:.4g}" for name in TRANSFORMS))
    policies = make_table(
        "policy",
        "error / max",
        "as converted",
        "selects",
        "error / max there",
        "as converted there",
    )
    for policy, summary in found.policies.items():
        policies.add_row(
            policy,
            _number(summary.ratio_of_means, ".4f"),
            _number(summary.converted_ratio_of_means, ".4f"),
            f"{len(summary.selected_layers)} layers",
            _number(summary.selected_ratio, ".4f"),
            _number(summary.converted_selected_ratio, ".4f"),
        )
    return Group(
        massive,
        errors,
        "activation difficulty",
        difficulties,
        "layer error",
        layers,
        "smoothing policies at down_proj with R4, mean error against max",
        policies,
        f"{out}: pictures in report.html",
    )


def _number(value: float | None, spec: str) -> str:
    return "" if value is None else format(value, spec)
