# SPDX-License-Identifier: Apache-2.0
"""Refuse settings of ``config.json`` by which transformers and the server would compute different
models.

vLLM 0.32 and transformers each read the configuration with a class of their own for a family. Where
both read a key, they mean the same by it; a key that only one of them reads must have the value by
which that one computes what the other does. ``tests/offline/test_configuration_keys.py`` holds this
against the source of both.
"""

from typing import Any

from smoothrot_offline.architectures.base import ModelSpec
from smoothrot_vllm.errors import UnsupportedModelError

SERVER_WIDE: dict[str, tuple[Any, ...]] = {
    # vLLM reads these for any model: attention to what follows, another configuration within this
    # one, another name of quantization_config, layers that differ.
    "is_causal": (True, None),
    "text_config": (None,),
    "compression_config": (None,),
    "is_heterogeneous": (False, None),
    "per_layer_config": (None,),
    "block_configs": (None,),
    "head_dtype": (None, "model"),
    "rotary_pct": (None,),
    "rotary_emb_fraction": (None,),
    "rotary_emb_base": (None,),
}
"""Keys that the server reads whatever the family, with the values that change nothing."""

_ROPE_KEYS = ("mrope_section", "xdrope_section", "use_fope", "rope_dim")
"""Keys of rope_parameters that vLLM computes by and transformers does not."""


def check_settings(spec: ModelSpec, config: dict[str, Any]) -> None:
    """Compare a configuration with what both sides compute.

    Args:
        spec: the model.
        config: ``config.json`` as read.

    Raises:
        UnsupportedModelError: a setting is not one that both compute; the message names its key.
    """
    parsed, table = spec.config, spec.architecture
    for rope in _rope_parameters(parsed.rope_parameters or {}):
        _check_rope(rope, table.partial_rotary)
    # What is no setting of transformers' class may still be in the file, where the server finds it.
    found = {key: config.get(key, values[0]) for key, values in SERVER_WIDE.items()}
    found |= {
        key: getattr(parsed, key, config.get(key, values[0]))
        for key, values in table.settings.items()
    }
    for key, values in (SERVER_WIDE | dict(table.settings)).items():
        if not any(
            found[key] == value and isinstance(found[key], bool) == isinstance(value, bool)
            for value in values
        ):
            raise _refused(spec, key, f"one of {', '.join(map(str, values))}", found[key])
    for key, other in table.same.items():
        if key in config and bool(config[key]) != bool(getattr(parsed, other, False)):
            raise _refused(
                spec, key, f"the value of {other}, {getattr(parsed, other, False)}", config[key]
            )
    if table.head_dim_from_hidden and spec.head_dim * spec.heads != spec.hidden:
        raise _refused(
            spec,
            "head_dim",
            f"hidden_size / num_attention_heads = {spec.hidden / spec.heads:g}",
            spec.head_dim,
        )
    if table.one_window:
        _check_one_window(spec)


def _check_rope(parameters: dict[str, Any], partial: bool) -> None:
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    kind = parameters.get("rope_type", "default")
    if kind not in ("default", *ROPE_INIT_FUNCTIONS):
        raise UnsupportedModelError(
            f"config.json: rope_type: expected one of default, {', '.join(ROPE_INIT_FUNCTIONS)},"
            f" got {kind!r}."
        )
    neutral: dict[str, Any] = dict.fromkeys(_ROPE_KEYS) | (
        {} if partial else {"partial_rotary_factor": 1.0}
    )
    for key, value in neutral.items():
        if parameters.get(key) not in (None, False, value):
            raise UnsupportedModelError(
                f"config.json: rope_parameters: {key}: expected {value or 'none'} (the server and"
                f" transformers do not compute the same by it), got {parameters[key]!r}."
            )


def _rope_parameters(parameters: Any) -> list[dict[str, Any]]:
    """The rotary parameters, or those of each kind of layer where they differ by kind."""
    if not isinstance(parameters, dict):
        return [{"rope_type": parameters}]
    return [nested for nested in parameters.values() if isinstance(nested, dict)] or [parameters]


def _check_one_window(spec: ModelSpec) -> None:
    window = getattr(spec.config, "sliding_window", None)
    kinds = set(spec.config.layer_types)
    expected = "full_attention" if window is None else "sliding_attention"
    if kinds != {expected}:
        use, layers = (
            getattr(spec.config, "use_sliding_window", None),
            getattr(spec.config, "max_window_layers", None),
        )
        raise _refused(
            spec,
            "use_sliding_window, max_window_layers and layer_types",
            "a sliding window in all layers or in none, as the server has one for all",
            f"use_sliding_window {use}, max_window_layers {layers} of {spec.layers} layers,"
            f" {', '.join(sorted(kinds))}",
        )


def _refused(spec: ModelSpec, key: str, expected: str, found: Any) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"config.json: {key}: expected {expected} (what transformers and the server both run for"
        f" {spec.architecture.class_name}), got {found!r}. Remove or correct it if the model does"
        " not need it."
    )
