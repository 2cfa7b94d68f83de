# SPDX-License-Identifier: Apache-2.0
"""Pages and pictures of reports. Transforms keep their color in every picture."""

import base64
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from smoothrot_offline.report.analysis import Analysis, LayerAnalysis, TransformRecord
from smoothrot_offline.report.measure import BINS, DOWN, KINDS, TRANSFORMS
from smoothrot_vllm.errors import ConfigError

_TEMPLATES = Environment(
    loader=PackageLoader("smoothrot_offline.report"),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)


def render(template: str, **values: object) -> str:
    """The page that ``templates/<template>`` makes of the values; every value is escaped."""
    return _TEMPLATES.get_template(template).render(**values)


def embedded(png: bytes, alternative: str) -> Markup:
    """An ``img`` element that holds its PNG; ``alternative`` is its text for those who cannot
    see it."""
    data = base64.b64encode(png).decode("ascii")
    return Markup('<img src="data:image/png;base64,{}" alt="{}">').format(data, alternative)


try:
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator
except ImportError as error:
    raise ConfigError(
        "analyze: needs matplotlib, which is not installed: pip install 'smoothrot-vllm[plots]'."
    ) from error

COLORS = {"none": "#7f7f7f", "S": "#e69f00", "R": "#0072b2", "S+R": "#009e73"}
MARKERS = {"none": "o", "S": "^", "R": "s", "S+R": "D"}
_POLICY_COLORS = ("#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#000000", "#f0e442")
_DPI = 110


@dataclass(frozen=True)
class LayerPictures:
    """What only the pictures show of a layer.

    ``surfaces``: ``|X|`` at down_proj by transform, pooled, of the sequence with the layer's
    largest value; ``shape``: its tokens and channels. ``learned`` and ``start``: the learned
    policy's scales and those it started from, float64 ``(f,)``; None if it did not run.
    """

    surfaces: Mapping[str, torch.Tensor]
    shape: tuple[int, int]
    learned: torch.Tensor | None
    start: torch.Tensor | None


def surfaces(layer: LayerAnalysis, pictures: LayerPictures) -> bytes:
    """``|X|`` at down_proj over tokens and channels, one panel for each transform, each with its
    own height."""
    figure = Figure(figsize=(13, 3.9))
    for number, name in enumerate(TRANSFORMS, start=1):
        panel: Any = figure.add_subplot(1, len(TRANSFORMS), number, projection="3d")
        values = pictures.surfaces[name]
        (rows, columns), (tokens, channels) = values.shape, pictures.shape
        y, x = torch.meshgrid(
            torch.arange(rows) * tokens / rows,
            torch.arange(columns) * channels / columns,
            indexing="ij",
        )
        panel.plot_surface(
            x.numpy(),
            y.numpy(),
            values.numpy(),
            cmap="viridis",
            rcount=rows,
            ccount=columns,
            linewidth=0,
            antialiased=False,
        )
        panel.set_title(
            f"{name}: max {float(values.max()):.4g}", color=COLORS[name], fontweight="bold"
        )
        panel.set_xlabel("channel", fontsize=8)
        panel.set_ylabel("token", fontsize=8)
        panel.tick_params(labelsize=7)
        panel.view_init(elev=25, azim=-55)
        panel.set_zlim(0)
        for axis in (panel.xaxis, panel.yaxis, panel.zaxis):
            axis.set_major_locator(MaxNLocator(4))
    figure.suptitle(f"|X| at down_proj of layer {layer.index}")
    figure.subplots_adjust(left=0.01, right=0.96, wspace=0.12, top=0.88, bottom=0.06)
    return _png(figure, tight=False)


def by_layer(analysis: Analysis, value: Callable[[TransformRecord], float], label: str) -> bytes:
    """A number of every transform of every kind of input against the layer, on a logarithmic
    scale."""
    figure = Figure(figsize=(13, 7), layout="constrained")
    panels = figure.subplots(2, 2, sharex=True).flat
    for panel, kind in zip(panels, KINDS, strict=True):
        inputs = [(layer.index, layer.inputs[kind]) for layer in analysis.layers]
        for name in inputs[0][1].transforms:
            points = [(index, value(found.transforms[name])) for index, found in inputs]
            style = {
                "color": COLORS[name],
                "marker": MARKERS[name],
                "markersize": 4,
                "linewidth": 1.5,
                "alpha": 0.9,
            }
            panel.plot(*zip(*points, strict=True), label=name, **style)
        for index in analysis.massive[kind].massive_layers:
            panel.axvspan(index - 0.4, index + 0.4, color="#f3d9d9", zorder=0)
        panel.set_yscale("log")
        panel.set_title(kind)
        panel.grid(alpha=0.3)
        panel.xaxis.set_major_locator(MaxNLocator(integer=True))
        panel.legend(fontsize=9)
    figure.supxlabel("decoder layer (shaded: a token of its input is massive)")
    figure.supylabel(label)
    return _png(figure)


def bins(layer: LayerAnalysis) -> bytes:
    """Share of down_proj's 4-bit activations and weights in each of the 16 codes, a column for each
    transform.

    Above all tokens on a logarithmic scale, below the token with the largest value.
    """
    figure = Figure(figsize=(13, 5.6), layout="constrained")
    panels: Any = figure.subplots(2, len(TRANSFORMS), sharex=True, sharey="row")
    codes = [code - BINS // 2 for code in range(BINS)]
    records = layer.inputs[DOWN].transforms
    for (every, peak), name in zip(panels.T, TRANSFORMS, strict=True):
        record = records[name]
        every.bar(codes, record.activation_bins, color=COLORS[name], width=0.9, label="activations")
        every.step(
            codes, record.weight_bins, color="#1c1c1c", where="mid", linewidth=1, label="weights"
        )
        every.set_yscale("log")
        every.set_ylim(1e-5, 4)
        every.set_title(f"{name}: {record.activation_bins[BINS // 2]:.1%} are 0", fontsize=10)
        every.legend(fontsize=8, loc="upper left", ncols=2)
        peak.bar(codes, record.peak_token_bins, color=COLORS[name], width=0.9)
        peak.set_title(f"that token: {record.peak_token_bins[BINS // 2]:.1%} are 0", fontsize=10)
        peak.set_xticks(codes[::2])
        for panel in (every, peak):
            panel.grid(axis="y", alpha=0.3)
    panels[0][0].set_ylabel("share, all tokens")
    panels[1][0].set_ylabel("share, token of the largest |x|")
    figure.suptitle(f"Codes of down_proj of layer {layer.index}")
    figure.supxlabel("code")
    return _png(figure)


def policy_ratios(analysis: Analysis) -> bytes:
    """Error at down_proj of each policy with R4 over that of max, by layer: plainly quantized,
    and as the converter does."""
    figure = Figure(figsize=(13, 4.2), layout="constrained")
    panels: Any = figure.subplots(1, 2, sharey=True)
    for color, policy in zip(_POLICY_COLORS, analysis.policies, strict=False):
        records = [(layer.index, layer.policies[policy]) for layer in analysis.layers]
        style = {"label": policy, "color": color, "marker": "o", "markersize": 4, "linewidth": 1.5}
        panels[0].plot(
            *zip(*((index, record.ratio_to_max) for index, record in records), strict=True), **style
        )
        panels[1].plot(
            *zip(
                *((index, record.converted_ratio_to_max) for index, record in records), strict=True
            ),
            **style,
        )
    for panel, title in zip(
        panels, ("plain quantizers", "the converter's quantizers"), strict=True
    ):
        for index in analysis.massive[DOWN].massive_layers:
            panel.axvspan(index - 0.4, index + 0.4, color="#f3d9d9", zorder=0)
        panel.set_yscale("log")
        panel.yaxis.set_major_formatter("{x:.2g}")
        panel.yaxis.set_minor_formatter("{x:.2g}")
        panel.set_title(title)
        panel.xaxis.set_major_locator(MaxNLocator(integer=True))
        panel.grid(which="both", alpha=0.3)
    panels[0].legend()
    figure.supxlabel("decoder layer (shaded: a token of its input is massive)")
    figure.supylabel("error / error of max")
    return _png(figure)


def learned_against_start(layers: Sequence[tuple[int, LayerPictures]]) -> bytes:
    """The learned scale of each channel against the one it started from, a panel for each layer."""
    figure = Figure(figsize=(5 * len(layers), 4.6), layout="constrained")
    for panel, (index, pictures) in zip(
        figure.subplots(1, len(layers), squeeze=False)[0], layers, strict=True
    ):
        assert pictures.start is not None
        assert pictures.learned is not None
        panel.scatter(
            pictures.start.numpy(), pictures.learned.numpy(), s=5, alpha=0.5, color=COLORS["S+R"]
        )
        both = torch.cat((pictures.start, pictures.learned))
        panel.axline((1, 1), slope=1, color="#7f7f7f", linewidth=1)
        panel.set(
            xscale="log", yscale="log", xlabel="start", ylabel="learned", title=f"layer {index}"
        )
        panel.set_xlim(float(both.min()) / 1.2, float(both.max()) * 1.2)
        panel.set_ylim(float(both.min()) / 1.2, float(both.max()) * 1.2)
        panel.grid(alpha=0.3)
    return _png(figure)


def _png(figure: Figure, tight: bool = True) -> bytes:
    buffer = io.BytesIO()
    # Without the metadata's software version the same numbers give the same bytes.
    figure.savefig(
        buffer,
        format="png",
        dpi=_DPI,
        metadata={"Software": None},
        bbox_inches="tight" if tight else None,
    )
    return buffer.getvalue()


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
                    surfaces(layer, layer_pictures[layer.index]),
                    f"surfaces of layer {layer.index}",
                ),
                embedded(bins(layer), f"occupied bins of layer {layer.index}"),
            )
            for layer in shown
        ],
        activation_difficulty=embedded(
            by_layer(analysis, lambda found: found.activation_difficulty, "activation difficulty"),
            "activation difficulty by layer",
        ),
        weight_difficulty=embedded(
            by_layer(analysis, lambda found: found.weight_difficulty, "weight difficulty"),
            "weight difficulty by layer",
        ),
        error=embedded(
            by_layer(analysis, lambda found: found.error, "layer error"),
            "layer error by layer",
        ),
        ratios=(
            embedded(policy_ratios(analysis), "policies against max")
            if len(analysis.policies) > 1
            else None
        ),
        learned=(
            embedded(learned_against_start(scatter), "learned against start scales")
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
