# SPDX-License-Identifier: Apache-2.0
"""Recipes by name, and the one that a model gets when nobody chooses: the best that finishes in reasonable time."""

from dataclasses import dataclass
from typing import Any, Literal

from smoothrot_offline.architectures import resolve
from smoothrot_offline.checkpoint import Checkpoint
from smoothrot_offline.config import ConvertConfig, make_config, make_schema
from smoothrot_offline.estimate import estimate_seconds
from smoothrot_vllm.errors import ConfigError

PresetName = Literal["auto", "fast", "balanced", "best", "none"]

REASONABLE_SECONDS = 3600.0
"""How long ``auto`` may let a conversion take, by the plan's estimate on this machine."""


@dataclass(frozen=True)
class Preset:
    """Options of a recipe; ``group_sizes`` are tried in order until one fits every linear of the model."""

    group_sizes: tuple[int, ...]
    options: dict[str, Any]


PRESETS = {
    "fast": Preset((128, 64, 32, -1), {"scales": "l2", "rounding": "rtn", "clip_search": True, "lm_head_bits": 8}),
    "balanced": Preset(
        (64, 32, -1),
        {"scales": "l2", "rounding": "gptq", "clip_search": True, "keep_8bit": 0.05, "lm_head_bits": 8},
    ),
    "best": Preset(
        (32, -1),
        {
            "scales": "learned",
            "rounding": "gptaq",
            "clip_search": True,
            "keep_8bit": 0.1,
            "sign_seeds": 4,
            "calib_samples": 128,
            "lm_head_bits": 8,
        },
    ),
}
"""From the quickest to the best."""


@dataclass(frozen=True)
class Choice:
    """A preset's configuration for one model, and why it was chosen."""

    config: ConvertConfig
    reason: str


def choose_preset(name: PresetName, explicit: dict[str, Any], checkpoint: Checkpoint) -> Choice:
    """The configuration of a conversion: a preset's options under those that the user gave.

    Args:
        name: of a preset; ``auto``: the best whose estimated time is reasonable, or else the quickest; ``none``: no preset.
        explicit: options that the user gave; they win over the preset's.
        checkpoint: of the model, its headers are enough.

    Raises:
        ConfigError: an option is out of range.
        UnsupportedModelError: the model cannot be converted.
    """
    if name == "none":
        return Choice(make_config(**explicit), "options as given, no preset")
    if name != "auto":
        return Choice(_configured(name, explicit, checkpoint), f"preset {name}, as asked for")
    for candidate in reversed(PRESETS):
        config = _configured(candidate, explicit, checkpoint)
        seconds = estimate_seconds(checkpoint, config)
        if seconds <= REASONABLE_SECONDS:
            break
    return Choice(config, f"preset {candidate}, about {max(1, round(seconds / 60))} min here; --preset chooses another")


def _configured(name: str, explicit: dict[str, Any], checkpoint: Checkpoint) -> ConvertConfig:
    preset = PRESETS[name]
    options = preset.options | {"preset": name} | explicit
    if "group_size" in explicit:
        return make_config(**options)
    spec = resolve(checkpoint.config)
    for group_size in preset.group_sizes:
        config = make_config(**options, group_size=group_size)
        try:
            make_schema(spec, config)
        except ConfigError:
            continue
        return config
    return config
