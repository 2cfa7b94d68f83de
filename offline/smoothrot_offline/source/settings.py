# SPDX-License-Identifier: Apache-2.0
"""Settings of a configuration that transformers and the server do not compute alike, refused by
name."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from smoothrot_offline.source.architecture import Architecture
from smoothrot_offline.source.family import ModelSpec
from smoothrot_vllm.errors import UnsupportedModelError

if TYPE_CHECKING:  # a refusal by name must not wait for it
    from transformers import PreTrainedConfig


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
OUTER_WIDE = {key: values for key, values in SERVER_WIDE.items() if key != "text_config"}
"""Those of them that count around a text tower."""
_BY_LAYER = ("is_heterogeneous", "per_layer_config")
"""Those by which the table of one model is made, where its family's layers differ."""

_ROPE_KEYS = ("mrope_section", "mrope_interleaved", "xdrope_section", "use_fope", "rope_dim")
"""Keys of rope_parameters that vLLM computes by and transformers does not."""
_SECTION_KEYS = _ROPE_KEYS[:2]
"""Those of them that both compute by, where positions are those of images."""
_YARN_NUMBERS = ("factor", "original_max_position_embeddings", "beta_fast", "beta_slow")
"""What a server that knows RoPE as YaRN alone reads of it, beside ``truncate``."""
_YARN_FACTORS = ("attention_factor", "mscale", "mscale_all_dim")
"""What it leaves to follow from these."""
MAX_SIZE = (1 << 31) - 1
"""Of a width or a count in a configuration."""


def check_size(key: str, found: object, most: int = MAX_SIZE) -> int:
    """A width or a count of a configuration.

    Raises:
        UnsupportedModelError: it is no whole number from 1 to ``most``; the message names its key.
    """
    if type(found) is not int or not 1 <= found <= most:
        raise UnsupportedModelError(
            f"config.json: {key}: expected a whole number from 1 to {most}, got {found!r}. Fetch"
            " config.json again."
        )
    return found


def check_settings(spec: ModelSpec, config: dict[str, Any]) -> None:
    """Compare a configuration with what both sides compute.

    Args:
        spec: the model.
        config: ``config.json`` as read.

    Raises:
        UnsupportedModelError: a setting is not one that both compute; the message names its key.
    """
    parsed, table = spec.config, spec.architecture
    by_layer = _BY_LAYER if any(kind.head_sizes for kind in spec.tables) else ()
    wide = {key: values for key, values in SERVER_WIDE.items() if key not in by_layer}
    for rope in _rope_parameters(parsed.rope_parameters or {}):
        _check_rope(rope, table)
        if any(kind.latent_attention for kind in spec.tables):
            _check_latent_rope(rope)
    check_values(table.class_name, parsed, config, wide, table.settings)
    for key, other in table.same.items():
        if key in config and bool(config[key]) != bool(getattr(parsed, other, False)):
            raise _refused(
                table.class_name,
                key,
                f"the value of {other}, {getattr(parsed, other, False)}",
                config[key],
            )
    if table.head_dim_from_hidden and spec.head_dim * spec.heads != spec.hidden:
        raise _refused(
            table.class_name,
            "head_dim",
            f"hidden_size / num_attention_heads = {spec.hidden / spec.heads:g}",
            spec.head_dim,
        )
    if table.one_window:
        _check_one_window(spec)
    if table.rope_in_windows:
        _check_rope_in_windows(spec)
    if spec.shared_sources:
        _check_width(spec)
    if spec.layer_embedding:
        _check_layer_vocabulary(spec)
    if table.scaled_queries:
        _check_scaled_queries(spec, config)
    if table.alternating_yarn:
        _check_alternating_yarn(spec)


def check_values(
    class_name: str,
    parsed: "PreTrainedConfig",
    config: dict[str, Any],
    wide: Mapping[str, tuple[Any, ...]],
    settings: Mapping[str, tuple[Any, ...]],
) -> None:
    """Compare keys of the file, and settings of what transformers makes of it, with the values that
    are allowed."""
    # What is no setting of transformers' class may still be in the file, where the server finds it.
    found = {key: config.get(key, values[0]) for key, values in wide.items()}
    found |= {
        key: getattr(parsed, key, config.get(key, values[0])) for key, values in settings.items()
    }
    for key, values in {**wide, **settings}.items():
        if not any(
            found[key] == value and isinstance(found[key], bool) == isinstance(value, bool)
            for value in values
        ):
            raise _refused(class_name, key, f"one of {', '.join(map(str, values))}", found[key])


def _check_rope(parameters: dict[str, Any], table: Architecture) -> None:
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    kind = parameters.get("rope_type", "default")
    if kind not in ("default", *ROPE_INIT_FUNCTIONS):
        raise UnsupportedModelError(
            f"config.json: rope_type: expected one of default, {', '.join(ROPE_INIT_FUNCTIONS)},"
            f" got {kind!r}."
        )
    keys = [key for key in _ROPE_KEYS if not (table.rotary_sections and key in _SECTION_KEYS)]
    proportional = kind == "proportional"
    neutral: dict[str, Any] = dict.fromkeys(keys)
    if not (table.partial_rotary or (proportional and table.proportional_rope)):
        neutral["partial_rotary_factor"] = 1.0
    if proportional:
        neutral["factor"] = 1.0
    for key, value in neutral.items():
        if parameters.get(key) not in (None, False, value):
            raise UnsupportedModelError(
                f"config.json: rope_parameters: {key}: expected {value or 'none'} (the server and"
                f" transformers do not compute the same by it), got {parameters[key]!r}."
            )


def _check_latent_rope(parameters: dict[str, Any]) -> None:
    """The server has one scaling for all kinds of RoPE but the default, yarn."""
    kind = parameters.get("rope_type", "default")
    if kind not in ("default", "yarn"):
        raise UnsupportedModelError(
            "config.json: rope_parameters: rope_type: expected default or yarn (the server takes"
            f" any other for yarn), got {kind!r}."
        )
    for key in ("attention_factor", "attn_factor", "truncate"):
        if parameters.get(key) is not None:
            raise UnsupportedModelError(
                f"config.json: rope_parameters: {key}: expected none (the server and transformers"
                f" do not compute the same by it), got {parameters[key]!r}."
            )
    one, all_dim = (parameters.get(key) for key in ("mscale", "mscale_all_dim"))
    if bool(one) != bool(all_dim):
        raise UnsupportedModelError(
            "config.json: rope_parameters: mscale and mscale_all_dim: expected both or neither"
            f" (transformers ignores one alone), got {one!r} and {all_dim!r}."
        )


def _rope_parameters(parameters: Any) -> list[dict[str, Any]]:
    """The rotary parameters, or those of each kind of layer where they differ by kind."""
    if not isinstance(parameters, dict):
        return [{"rope_type": parameters}]
    return [nested for nested in parameters.values() if isinstance(nested, dict)] or [parameters]


def _check_one_window(spec: ModelSpec) -> None:
    window = getattr(spec.config, "sliding_window", None)
    kinds = set(spec.config.layer_types)
    expected = "sliding_attention" if window else "full_attention"
    if kinds != {expected}:
        use, layers = (
            getattr(spec.config, "use_sliding_window", None),
            getattr(spec.config, "max_window_layers", None),
        )
        raise _refused(
            spec.architecture.class_name,
            "use_sliding_window, max_window_layers and layer_types",
            "a sliding window in all layers or in none, as the server has one for all",
            f"use_sliding_window {use}, max_window_layers {layers} of {spec.layers} layers,"
            f" {', '.join(sorted(kinds))}",
        )


def _check_rope_in_windows(spec: ModelSpec) -> None:
    window, kinds = spec.config.sliding_window, set(spec.config.layer_types)
    if (window is None) != ("sliding_attention" not in kinds):
        raise _refused(
            spec.architecture.class_name,
            "sliding_window and layer_types",
            "a window and layers of sliding_attention, or neither",
            f"{window} and {', '.join(sorted(kinds))}",
        )


def _check_width(spec: ModelSpec) -> None:
    if spec.config.use_double_wide_mlp:
        raise _refused(
            spec.architecture.class_name,
            "use_double_wide_mlp",
            "False: the format knows one width of down_proj's input",
            True,
        )


def _check_layer_vocabulary(spec: ModelSpec) -> None:
    if (found := spec.config.vocab_size_per_layer_input) < spec.vocab:
        raise _refused(
            spec.architecture.class_name,
            "vocab_size_per_layer_input",
            f"at least vocab_size, {spec.vocab}",
            found,
        )


def _check_scaled_queries(spec: ModelSpec, config: dict[str, Any]) -> None:
    rope = spec.config.rope_parameters
    context = "original_max_position_embeddings"
    for key in ("llama_4_scaling_beta", context):
        if type(rope.get(key)) not in (int, float):
            raise _refused(
                spec.architecture.class_name, f"rope_parameters: {key}", "a number", rope.get(key)
            )
    expected, found = server_keys(spec)["llama_4_scaling"], config.get("llama_4_scaling")
    if found not in (None, expected):
        raise _refused(
            spec.architecture.class_name,
            "llama_4_scaling",
            f"none, or {expected} as in rope_parameters",
            found,
        )


def _check_alternating_yarn(spec: ModelSpec) -> None:
    name, rope = spec.architecture.class_name, spec.config.rope_parameters
    if rope.get("rope_type") != "yarn":
        raise _refused(name, "rope_parameters: rope_type", "yarn", rope.get("rope_type"))
    for key in _YARN_NUMBERS:
        if type(rope.get(key)) not in (int, float):
            raise _refused(name, f"rope_parameters: {key}", "a number", rope.get(key))
    for key in _YARN_FACTORS:
        if rope.get(key) is not None:
            raise _refused(name, f"rope_parameters: {key}", "none", rope[key])
    window, kinds = spec.config.sliding_window, spec.config.layer_types
    if type(window) is not int or window < 1:
        raise _refused(name, "sliding_window", "a whole number from 1 on", window)
    for index, kind in enumerate(kinds):
        expected = ("sliding_attention", "full_attention")[index % 2]
        if kind != expected:
            raise _refused(name, f"layer_types of layer {index}", expected, kind)


def server_keys(spec: ModelSpec) -> dict[str, Any]:
    """What the server reads by keys of its own where transformers reads others: a conversion writes
    both into the text model's configuration."""
    keys = dict(spec.architecture.server_keys)
    if spec.architecture.named_head_dim:
        keys["head_dim"] = spec.head_dim
    if spec.architecture.scaled_queries:
        rope, context = spec.config.rope_parameters, "original_max_position_embeddings"
        scaling = {"beta": rope["llama_4_scaling_beta"], context: rope[context]}
        keys["llama_4_scaling"] = scaling
    return keys


def _refused(class_name: str, key: str, expected: str, found: Any) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"config.json: {key}: expected {expected} (what transformers and the server both run for"
        f" {class_name}), got {found!r}. Remove or correct it if the model does"
        " not need it."
    )
