# SPDX-License-Identifier: Apache-2.0
"""From config.json to a model that can be converted: its family and sizes, and the refusal of
everything else by name."""

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from smoothrot_offline.source.composite import Composite
from smoothrot_offline.source.composites import COMPOSITES
from smoothrot_offline.source.families import (
    GEMMA2,
    GEMMA3,
    LLAMA,
    MISTRAL,
    MIXTRAL,
    PHI3,
    QWEN2,
    QWEN3,
    QWEN3_MOE,
    SMOLLM3,
)
from smoothrot_offline.source.family import Architecture, Experts, ModelSpec
from smoothrot_offline.source.headers import is_fp8
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
_OUTER_WIDE = {key: values for key, values in SERVER_WIDE.items() if key != "text_config"}
"""Those of them that count around a text tower."""

_ROPE_KEYS = ("mrope_section", "mrope_interleaved", "xdrope_section", "use_fope", "rope_dim")
"""Keys of rope_parameters that vLLM computes by and transformers does not."""
_SECTION_KEYS = _ROPE_KEYS[:2]
"""Those of them that both compute by, where positions are those of images."""


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
        _check_rope(rope, table)
    _check_values(table.class_name, parsed, config, SERVER_WIDE, table.settings)
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


def _check_values(
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
    neutral: dict[str, Any] = dict.fromkeys(keys) | (
        {} if table.partial_rotary else {"partial_rotary_factor": 1.0}
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
            spec.architecture.class_name,
            "use_sliding_window, max_window_layers and layer_types",
            "a sliding window in all layers or in none, as the server has one for all",
            f"use_sliding_window {use}, max_window_layers {layers} of {spec.layers} layers,"
            f" {', '.join(sorted(kinds))}",
        )


def _refused(class_name: str, key: str, expected: str, found: Any) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"config.json: {key}: expected {expected} (what transformers and the server both run for"
        f" {class_name}), got {found!r}. Remove or correct it if the model does"
        " not need it."
    )


_TABLES = (LLAMA, MISTRAL, QWEN2, QWEN3, PHI3, SMOLLM3, GEMMA2, GEMMA3, MIXTRAL, QWEN3_MOE)
SUPPORTED = {table.model_type: table for table in _TABLES}
MAX_SIZE = (1 << 31) - 1
"""Of a width or a count in a configuration."""
MAX_LAYERS = 1 << 12
MAX_EXPERTS = 1 << 16
"""Of all layers: several times the largest model's, and what names of tensors can be written out
for."""
_MODEL_CODE = ("AutoConfig", "AutoModel", "AutoModelForCausalLM")
"""Keys of ``auto_map`` that name code which says what the model computes. No other code that it
names is run either."""
_EXPERT_KEYS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_intermediate_size")


def resolve(config: dict[str, Any]) -> ModelSpec:
    """The family and the sizes of a model.

    Args:
        config: ``config.json`` as read.

    Raises:
        UnsupportedModelError: the model cannot be converted exactly; the message names the reason.
    """
    # It imports torch and transformers, which a refusal by name must not wait for.
    from smoothrot_offline.source.models import beside_text, parse_config

    table = supported_table(config)
    composite = COMPOSITES.get(config.get("model_type"))
    if composite is None:
        return _resolve_text(config, table)
    outer = parse_config(config, composite.model_type)
    _check_values(composite.class_name, outer, config, _OUTER_WIDE, composite.settings)
    # Of transformers' classes the one around the text tower ties the head.
    text = outer.text_config.to_dict() | {"tie_word_embeddings": outer.tie_word_embeddings}
    spec = _resolve_text(text, table)
    kept = {
        name: shape
        for module, shape in beside_text(outer).items()
        if composite.keeps(name := composite.stored_name(module))
    }
    for name, shape in kept.items():
        if composite.writes(name) and shape[0] != spec.hidden:
            raise UnsupportedModelError(
                f"config.json: vision_config: expected images as wide as text, {spec.hidden}, got"
                f" {shape[0]} outputs of {name.rpartition('.')[0]}."
            )
    placed = composite.place(spec.architecture)
    return replace(spec, architecture=placed, composite=composite, outer=outer, kept=kept)


def _resolve_text(config: dict[str, Any], table: Architecture) -> ModelSpec:
    from smoothrot_offline.source.models import parse_config

    parsed = parse_config(config, table.model_type)
    layers = _size(parsed, "num_hidden_layers", MAX_LAYERS)
    hidden, heads = (_size(parsed, key) for key in ("hidden_size", "num_attention_heads"))
    if (
        getattr(parsed, "head_dim", 0) is None
    ):  # which some of transformers' classes take for a number
        parsed.head_dim = hidden // heads
    experts = 0 if table.experts is None else _count_experts(table.experts, parsed, layers)
    spec = ModelSpec(
        architecture=table.with_experts(experts),
        config=parsed,
        layers=layers,
        hidden=hidden,
        intermediate=_size(
            parsed, table.experts.intermediate if table.experts else "intermediate_size"
        ),
        heads=heads,
        kv_heads=_size(parsed, "num_key_value_heads"),
        # Qwen2's configuration class has no default for it.
        head_dim=(
            _size(parsed, "head_dim")
            if getattr(parsed, "head_dim", None) is not None
            else hidden // heads
        ),
        vocab=_size(parsed, "vocab_size"),
        tied=bool(parsed.tie_word_embeddings),
        experts=experts,
    )
    if spec.heads % spec.kv_heads:
        raise UnsupportedModelError(
            f"config.json: expected {spec.heads} attention heads to be a multiple of"
            f" {spec.kv_heads} key-value heads."
        )
    check_settings(spec, config)
    return spec


def _size(parsed: "PreTrainedConfig", key: str, most: int = MAX_SIZE) -> int:
    found = getattr(parsed, key)
    if type(found) is not int or not 1 <= found <= most:
        raise UnsupportedModelError(
            f"config.json: {key}: expected a whole number from 1 to {most}, got {found!r}. Fetch"
            " config.json again."
        )
    return found


def _count_experts(experts: Experts, parsed: "PreTrainedConfig", layers: int) -> int:
    count, chosen = _size(parsed, experts.count), parsed.num_experts_per_tok
    if layers * count > MAX_EXPERTS:
        raise UnsupportedModelError(
            f"config.json: {experts.count}: expected at most {MAX_EXPERTS} in all layers, got"
            f" {count} in each of {layers}."
        )
    if type(chosen) is not int or not 1 <= chosen <= count:
        raise UnsupportedModelError(
            f"config.json: num_experts_per_tok: expected 1 to {experts.count} = {count} experts for"
            f" each token, got {chosen}."
        )
    for key, value in experts.everywhere.items():
        if (found := getattr(parsed, key)) != value:
            raise UnsupportedModelError(
                f"config.json: {key}: expected {value!r}, experts in every layer, got {found!r}: a"
                " model that mixes layers with and without experts is not converted."
            )
    return int(count)


def supported_table(config: dict[str, Any], fp8: bool = False) -> Architecture:
    """The table of a model's family. Imports neither torch nor transformers.

    Args:
        config: ``config.json`` as read.
        fp8: whether block-scaled FP8 weights are let pass, which are dequantized as they are read.

    Raises:
        UnsupportedModelError: there is none, or the weights are quantized, or the model needs code
            of its own.
    """
    model_type = config.get("model_type")
    classes = config.get("architectures") or []
    if (
        not isinstance(model_type, str | None)
        or not isinstance(classes, list)
        or not all(isinstance(c, str) for c in classes)
    ):
        raise UnsupportedModelError(
            "config.json: expected a text as model_type and a list of texts as architectures, got"
            f" {model_type!r}, {classes!r}."
        )
    names = ", ".join(classes or [str(model_type)])
    quantization = config.get("quantization_config")
    if quantization is not None and not (fp8 and is_fp8(config)):
        method = (
            quantization.get("quant_method", "unknown")
            if isinstance(quantization, dict)
            else quantization
        )
        raise UnsupportedModelError(
            f"{names} is already quantized (quantization_config, quant_method {method!r}). "
            "Convert the 16-bit model it was made from."
        )
    composite = COMPOSITES.get(model_type) if isinstance(model_type, str) else None
    if composite is not None:
        table: Architecture | None = _text_table(composite, config)
    else:
        table = SUPPORTED.get(model_type) if isinstance(model_type, str) else None
    if own_code := _own_code(config, table):
        raise UnsupportedModelError(
            f"{names} needs its own Python code (auto_map in config.json: {own_code}), which is"
            " never run. Convert a model whose architecture transformers itself implements."
        )
    experts = next((key for key in _EXPERT_KEYS if config.get(key)), None)
    if experts is not None and (table is None or table.experts is None):
        mixtures = ", ".join(known.class_name for known in _TABLES if known.experts is not None)
        raise UnsupportedModelError(
            f"{names} is a mixture of experts ({experts} = {config[experts]}): of those, only"
            f" {mixtures} convert."
        )
    if table is None:
        raise UnsupportedModelError(
            f"{names} (model_type {model_type!r}) is not supported: no table says where its"
            " transforms are folded (CONTRIBUTING.md). Supported model types:"
            f" {', '.join((*SUPPORTED, *COMPOSITES))}."
        )
    class_name = table.class_name if composite is None else composite.class_name
    if classes == [class_name.partition("For")[0] + "Model"]:
        raise UnsupportedModelError(
            f"config.json: architectures: {names} is an embedding model, a base model without a"
            f" head: expected {class_name}. Its hidden states would come out rotated. Convert"
            " a causal language model."
        )
    if classes and classes != [class_name]:
        raise UnsupportedModelError(
            f"config.json: architectures: expected {class_name} for model_type"
            f" {model_type!r}, got {', '.join(classes)}."
        )
    if not table.layer_types and config.get("layer_types"):
        raise UnsupportedModelError(
            f"{names} mixes attention kinds (layer_types), which transformers ignores for"
            f" {model_type!r}."
        )
    return table


def _text_table(composite: Composite, config: dict[str, Any]) -> Architecture:
    """The table of the text tower that a configuration around it names."""
    inner = config.get("text_config")
    named = inner.get("model_type") if isinstance(inner, dict) else None
    if named is None:
        return composite.text[0]
    for table in composite.text:
        if table.model_type == named:
            return table
    raise UnsupportedModelError(
        f"config.json: text_config: model_type: expected one of"
        f" {', '.join(table.model_type for table in composite.text)} within"
        f" {composite.class_name}, got {named!r}."
    )


def _own_code(config: dict[str, Any], table: Architecture | None) -> str | None:
    """The Python class that a configuration asks for in place of the one of transformers."""
    own = config.get("auto_map")
    if not own:
        return None
    # Where it names another repository, the class comes after two dashes.
    named = [own.get(key) for key in _MODEL_CODE] if isinstance(own, dict) else [own]
    allowed = () if table is None else table.replaced_code
    return next(
        (
            str(code)
            for code in named
            if code is not None and str(code).rpartition("--")[2] not in allowed
        ),
        None,
    )
