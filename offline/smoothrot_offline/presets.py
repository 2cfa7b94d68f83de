# SPDX-License-Identifier: Apache-2.0
"""Recipes by name, and the one that a model gets when nobody chooses: the best that finishes in
reasonable time."""

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from smoothrot_offline import ranks
from smoothrot_offline.check.plan import estimate_seconds
from smoothrot_offline.config import ConvertConfig, make_config, make_schema
from smoothrot_offline.source.checkpoint import Checkpoint, check_source
from smoothrot_offline.source.family import ModelSpec
from smoothrot_offline.source.headers import MODULES_NAME, embedding_modules
from smoothrot_offline.source.packings.packed import Packing
from smoothrot_offline.source.resolve import resolve
from smoothrot_vllm.errors import SmoothRotError

PresetName = Literal["auto", "fast", "balanced", "best", "paper-compat", "none"]

REASONABLE_SECONDS = 3600.0
"""How long ``auto`` may let a conversion take, by the plan's estimate on this machine."""


MOST_DISTILLED = 2_000_000_000
"""Weights of the largest model that a preset distills: the original and the rounded one are then in
memory as a whole, where a conversion otherwise holds a layer."""


@dataclass(frozen=True)
class Preset:
    """Options of a recipe; ``group_sizes`` are tried in order until one fits every linear of the
    model."""

    group_sizes: tuple[int, ...]
    options: dict[str, Any]


PRESETS = {
    "fast": Preset(
        (128, 64, 32, -1),
        {
            "scales": "l2",
            "smooth_norms": True,
            "rounding": "rtn",
            "clip_search": True,
            "lm_head_bits": 8,
        },
    ),
    "balanced": Preset(
        (64, 32, -1),
        {
            "scales": "l2",
            "smooth_norms": True,
            "rounding": "gptq",
            "clip_search": True,
            "keep_8bit": 0.05,
            "lm_head_bits": 8,
            "calib_samples": 32,
            "distill_steps": 10,
        },
    ),
    "best": Preset(
        (32, -1),
        {
            "scales": "l2",
            "smooth_norms": True,
            "rounding": "gptq",
            "hessian": "tokens",
            "clip_search": True,
            "keep_8bit": 0.1,
            "lm_head_bits": 8,
            "distill_steps": 64,
        },
    ),
}
"""From the quickest to the best."""

PAPER = Preset((-1,), {"scales": "max", "alpha": 0.5, "rounding": "gptq", "act_order": False})
"""SmoothRot as published (arXiv 2506.05413): plain maxima, alpha 0.5, GPTQ per channel in the
channels' own order."""


@dataclass(frozen=True)
class Choice:
    """A preset's configuration for one model, why it was chosen, and what in it is not the
    preset's first choice."""

    config: ConvertConfig
    reason: str
    notes: tuple[str, ...] = ()


def choose_preset(name: PresetName, explicit: dict[str, Any], checkpoint: Checkpoint) -> Choice:
    """The configuration of a conversion: a preset's options under those that the user gave.

    Args:
        name: of a preset; ``auto``: the best whose estimated time is reasonable, or else the
            quickest; ``none``: no preset.
        explicit: options that the user gave; they win over the preset's.
        checkpoint: of the model, its headers are enough.

    Raises:
        ConfigError: an option is out of range.
    """
    notes: tuple[str, ...] = ()
    if "residual" not in explicit and embedding_modules(Path(checkpoint.path)):
        explicit = explicit | {"residual": "online"}
        notes = (
            f"--residual online: {MODULES_NAME} says that this model gives embeddings, which are"
            " its hidden states",
        )
    choice = _choose(name, explicit, checkpoint)
    return replace(choice, notes=(*notes, *choice.notes))


def _choose(name: PresetName, explicit: dict[str, Any], checkpoint: Checkpoint) -> Choice:
    if name == "none":
        return Choice(make_config(**explicit), "options as given, no preset")
    try:
        spec = resolve(checkpoint.config, checkpoint.tensors)
        left = [*spec.behind(checkpoint.tensors), *spec.unread(checkpoint.tensors)]
        unused = [f"{spec.architecture.lm_head}.weight", *left]
        check_source(checkpoint, spec.source_tensors(), ignorable=unused)
    except SmoothRotError:
        # What is wrong with the model is for the conversion to say, or for the plan.
        return Choice(make_config(**explicit), "no preset: the model cannot be converted")
    packing = checkpoint.packing
    if name != "auto":
        config, notes = configure(name, explicit, spec, packing)
        return Choice(config, f"preset {name}, as asked for", notes)
    for candidate in reversed(PRESETS):
        config, notes = configure(candidate, explicit, spec, packing)
        # Of all ranks alike, as it follows from speeds measured for a moment.
        seconds = ranks.from_first(partial(estimate_seconds, checkpoint, config))
        if seconds <= REASONABLE_SECONDS:
            break
    return Choice(
        config,
        f"preset {candidate}, about {max(1, round(seconds / 60))} min on the CPU here; --preset"
        " chooses another",
        notes,
    )


def configure(
    name: str, explicit: dict[str, Any], spec: ModelSpec, packing: Packing | None = None
) -> tuple[ConvertConfig, tuple[str, ...]]:
    """A preset's configuration, with the first of its group sizes that fits the model, the last one
    if none does; and what in it is not the preset's first choice.

    Args:
        name: one of :data:`PRESETS`, or ``paper-compat``.
        explicit: options that win over the preset's.
        spec: of the model.
        packing: of the source's weights.

    Raises:
        ConfigError: an option is out of range.
    """
    preset = PAPER if name == "paper-compat" else PRESETS[name]
    head = {} if spec.architecture.quantizes_head else {"lm_head_bits": 16}
    # Shifts error from 4-bit inputs to the weights; next to 8-bit inputs, whose error is small, it
    # would only harm those.
    smooths = explicit.get("activation_bits", 4) == 4 and spec.architecture.norms
    norms = {} if smooths else {"smooth_norms": False}
    options = preset.options | head | norms | {"preset": name}
    notes = []
    if not spec.architecture.scales_products and "scales" not in explicit:
        options |= {"scales": "none", "smooth_norms": False}
        notes.append(
            f"preset {name}: nothing is smoothed: experts of {spec.architecture.class_name} compute"
            " (up + 1) * glu of a clamped up, which no scale commutes with"
        )
    obstacle = _obstacle_to_distilling(spec, explicit, packing)
    if obstacle and options.get("distill_steps") and "distill_steps" not in explicit:
        options["distill_steps"] = 0
        notes.append(f"preset {name}: the rounded model is not distilled: {obstacle}")
    sizes = (explicit["group_size"],) if "group_size" in explicit else preset.group_sizes
    configs = [make_config(**options | explicit | {"group_size": size}) for size in sizes]
    problems = [_misfit(spec, config) for config in configs]
    chosen = next(
        (config for config, problem in zip(configs, problems, strict=True) if problem is None),
        configs[-1],
    )
    if problems[0] is not None and chosen is not configs[0]:
        fallen = (
            "to one scale for each output channel"
            if chosen.group_size == -1
            else f"to groups of {chosen.group_size}"
        )
        notes.append(
            f"preset {name}: weights fall from groups of {sizes[0]} {fallen}: {problems[0]}"
        )
    return chosen, tuple(notes)


def _obstacle_to_distilling(
    spec: ModelSpec, explicit: dict[str, Any], packing: Packing | None
) -> str | None:
    """Why a preset does not, or None."""
    if explicit.get("residual") == "online":
        return "it would train norms, and hidden states are to stay those of the source"
    if packing is not None:
        return f"the original cannot run as a whole with {packing.title} weights"
    weights = spec.decoder_weights() + spec.vocab * spec.hidden
    if weights <= MOST_DISTILLED:
        return None
    return (
        f"{weights / 1e9:.1f} billion weights, and presets do it up to"
        f" {MOST_DISTILLED / 1e9:.0f} billion, as it takes the whole model in memory twice;"
        " --distill-steps asks for it"
    )


def _misfit(spec: ModelSpec, config: ConvertConfig) -> str | None:
    """Why the configuration does not fit the model, or None."""
    try:
        make_schema(spec, config)
    except SmoothRotError as error:
        return str(error)
    return None
