# SPDX-License-Identifier: Apache-2.0
"""From config.json to a model that can be converted: its family and sizes, and the refusal of
everything else by name."""

from collections.abc import Iterable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from smoothrot_offline.source.architecture import Architecture
from smoothrot_offline.source.composite import Composite
from smoothrot_offline.source.composites import COMPOSITES
from smoothrot_offline.source.families import (
    ERNIE,
    EXAONE4,
    GEMMA2,
    GEMMA3,
    GLM,
    GLM4,
    GRANITE,
    HUNYUAN,
    LLAMA,
    MINISTRAL3,
    MISTRAL,
    OLMO2,
    OLMO3,
    PHI3,
    QWEN2,
    QWEN3,
    SEED_OSS,
    SMOLLM3,
)
from smoothrot_offline.source.family import ModelSpec
from smoothrot_offline.source.gemma4 import GEMMA4
from smoothrot_offline.source.linear_attention import QWEN3_5
from smoothrot_offline.source.mixtures import MAX_EXPERTS, MIXTURES
from smoothrot_offline.source.packings.table import PACKINGS, find_packing
from smoothrot_offline.source.parts import Experts, LatentAttention, LinearAttention, Routing
from smoothrot_offline.source.settings import (
    MAX_SIZE,
    OUTER_WIDE,
    check_settings,
    check_size,
    check_values,
)
from smoothrot_vllm.errors import UnsupportedModelError

if TYPE_CHECKING:  # a refusal by name must not wait for it
    from transformers import PreTrainedConfig


_TABLES = (
    LLAMA,
    MISTRAL,
    QWEN2,
    QWEN3,
    QWEN3_5,
    PHI3,
    SMOLLM3,
    GEMMA2,
    GEMMA3,
    GEMMA4,
    GRANITE,
    SEED_OSS,
    HUNYUAN,
    ERNIE,
    GLM,
    GLM4,
    MINISTRAL3,
    OLMO2,
    OLMO3,
    EXAONE4,
    *MIXTURES.values(),
)
SUPPORTED = {table.model_type: table for table in _TABLES}
MAX_LAYERS = 1 << 12
_MODEL_CODE = ("AutoConfig", "AutoModel", "AutoModelForCausalLM")
"""Keys of ``auto_map`` that name code which says what the model computes. No other code that it
names is run either."""
_EXPERT_KEYS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_intermediate_size")


def resolve(config: dict[str, Any], names: Iterable[str] = ()) -> ModelSpec:
    """The family and the sizes of a model.

    Args:
        config: ``config.json`` as read.
        names: of its tensors, or of modules, which tell whether it has a draft head of its own.

    Raises:
        UnsupportedModelError: the model cannot be converted exactly; the message names the reason.
    """
    spec = _resolve(config)
    head = spec.architecture.draft
    if head is None or not any(map(head.has, names)):
        return spec
    most = min(MAX_LAYERS, MAX_EXPERTS // max(1, spec.experts))
    layers = check_size(head.layers, getattr(spec.config, head.layers, 1), most)
    return spec.with_draft(head, layers)


def _resolve(config: dict[str, Any]) -> ModelSpec:
    # It imports torch and transformers, which a refusal by name must not wait for.
    from smoothrot_offline.source.models import beside_text, parse_config

    table = supported_table(config)
    composite = COMPOSITES.get(config.get("model_type"))
    if composite is None:
        return _resolve_text(config, table)
    outer = parse_config(config, composite.model_type)
    check_values(composite.class_name, outer, config, OUTER_WIDE, composite.settings)
    if outer.vision_config is None:
        raise UnsupportedModelError(
            f"config.json: vision_config: expected one, without which the server has no"
            f" {composite.class_name}, got none. Fetch config.json again."
        )
    # Of transformers' classes the one around the text tower ties the head.
    text = outer.text_config.to_dict() | {"tie_word_embeddings": outer.tie_word_embeddings}
    spec = _resolve_text(text, table)
    check_values(composite.class_name, outer.text_config, text, {}, composite.text_settings)
    beside = {
        name: shape
        for module, shape in beside_text(outer).items()
        if composite.keeps(name := composite.stored_name(module))
    }
    for name, shape in beside.items():
        if composite.writes(name) and shape[0] != spec.hidden:
            raise UnsupportedModelError(
                f"config.json: vision_config: expected images as wide as text, {spec.hidden}, got"
                f" {shape[0]} outputs of {name.rpartition('.')[0]}."
            )
    placed = composite.place(spec.architecture)
    kept = dict(zip(placed.beside, spec.kept.values(), strict=True)) | beside
    return replace(spec, architecture=placed, composite=composite, outer=outer, kept=kept)


def _resolve_text(config: dict[str, Any], table: Architecture) -> ModelSpec:
    from smoothrot_offline.source.models import parse_config

    parsed = parse_config(config, table.model_type)
    layers = _size(parsed, "num_hidden_layers", MAX_LAYERS)
    hidden, heads = (_size(parsed, key) for key in ("hidden_size", "num_attention_heads"))
    # Where heads differ by layer, only the configuration of a layer has theirs.
    first = parsed.per_layer_config[0] if parsed.is_heterogeneous else parsed
    if (
        getattr(first, "head_dim", 0) is None
    ):  # which some of transformers' classes take for a number
        first.head_dim = hidden // heads
    if table.kinds and (table.experts is None or not table.experts.dense):
        _check_kinds(table, parsed)
    if table.of_config is not None:
        table = table.of_config(table, parsed)
    experts = shared = dense = 0
    if table.experts is not None:
        experts = _count_experts(table.experts, parsed, layers)
        if (beside := table.experts.shared) is not None:
            shared = _size(parsed, beside.intermediate)
            shared *= _size(parsed, beside.count) if beside.count else 1
        if table.experts.dense:
            dense = _size(parsed, "intermediate_size")
    spec = ModelSpec(
        architecture=table.with_experts(experts),
        config=parsed,
        layers=layers,
        hidden=hidden,
        intermediate=_size(
            parsed, table.experts.intermediate if table.experts else "intermediate_size"
        ),
        heads=heads,
        kv_heads=_size(first, "num_key_value_heads"),
        # Qwen2's configuration class has no default for it.
        head_dim=(
            _size(first, "head_dim")
            if getattr(first, "head_dim", None) is not None
            else hidden // heads
        ),
        vocab=_size(parsed, "vocab_size"),
        tied=bool(parsed.tie_word_embeddings),
        experts=experts,
        shared=shared,
        dense=dense,
    )
    if (latent := table.latent_attention) is not None:
        spec = replace(spec, head_dim=_size(parsed, latent.values))
        _check_latent_attention(latent, parsed)
    for kind_of_layer in spec.tables:
        if kind_of_layer.linear_attention is not None:
            _check_linear_attention(kind_of_layer.linear_attention, parsed)
    for kv_heads, _ in map(spec.head_sizes, spec.tables):
        if spec.heads % kv_heads:
            raise UnsupportedModelError(
                f"config.json: expected {spec.heads} attention heads to be a multiple of"
                f" {kv_heads} key-value heads."
            )
    if spec.layer_embedding:
        _size(parsed, spec.architecture.layer_embedding)
    check_settings(spec, config)
    sizes, kept = spec.dimensions(spec.architecture), spec.architecture.beside.items()
    return replace(
        spec, kept={name: tuple(sizes[dimension] for dimension in of) for name, of in kept}
    )


def _size(parsed: "PreTrainedConfig", key: str, most: int = MAX_SIZE) -> int:
    return check_size(key, getattr(parsed, key), most)


def _check_kinds(table: Architecture, parsed: "PreTrainedConfig") -> None:
    for index, kind in enumerate(parsed.layer_types):
        if kind not in table.kinds:
            raise UnsupportedModelError(
                f"config.json: layer_types: expected one of {', '.join(table.kinds)} for each layer"
                f" of {table.class_name}, got {kind!r} for layer {index}."
            )


def _check_latent_attention(keys: LatentAttention, parsed: "PreTrainedConfig") -> None:
    for key in (keys.rank, keys.keys, keys.rotary):
        _size(parsed, key)
    if getattr(parsed, keys.query_rank) is not None:
        _size(parsed, keys.query_rank)
    for key, same in (("num_key_value_heads", "num_attention_heads"), ("head_dim", keys.rotary)):
        expected, found = getattr(parsed, same), getattr(parsed, key)
        if found != expected:
            raise UnsupportedModelError(
                f"config.json: {key}: expected {same}, {expected}, got {found!r}. Fetch config.json"
                " again."
            )


def _check_linear_attention(keys: LinearAttention, parsed: "PreTrainedConfig") -> None:
    for key in (keys.key_head_dim, keys.value_head_dim, keys.kernel):
        _size(parsed, key)
    heads, groups = (_size(parsed, key) for key in (keys.value_heads, keys.key_heads))
    if heads % groups:
        raise UnsupportedModelError(
            f"config.json: expected {keys.value_heads}, {heads}, to be a multiple of"
            f" {keys.key_heads}, {groups}."
        )


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
    first = getattr(parsed, experts.dense) if experts.dense else 0
    if type(first) is not int or not 0 <= first < layers:
        raise UnsupportedModelError(
            f"config.json: {experts.dense}: expected how many of the first layers have no experts,"
            f" fewer than num_hidden_layers = {layers}, got {first!r}. Fetch config.json again."
        )
    if experts.routing.groups:
        _check_groups(experts.routing, parsed, count, chosen)
    return int(count)


def _check_groups(routing: Routing, parsed: "PreTrainedConfig", count: int, chosen: int) -> None:
    groups, kept = (_size(parsed, key) for key in (routing.groups, routing.kept_groups))
    of_group = count // groups
    if count % groups or of_group < routing.of_group or kept > groups or kept * of_group < chosen:
        raise UnsupportedModelError(
            f"config.json: expected {routing.groups}, {groups}, to divide {count} experts into"
            f" groups of {routing.of_group} or more, and {routing.kept_groups}, {kept}, of them to"
            f" hold num_experts_per_tok, {chosen}. Fetch config.json again."
        )


def supported_table(config: dict[str, Any], packed: bool = False) -> Architecture:
    """The table of a model's family. Imports neither torch nor transformers.

    Args:
        config: ``config.json`` as read.
        packed: whether weights in a packing that is read are let pass.

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
    if quantization is not None and not (packed and find_packing(config)):
        method = (
            quantization.get("quant_method", "unknown")
            if isinstance(quantization, dict)
            else quantization
        )
        raise UnsupportedModelError(
            f"{names} is already quantized (quantization_config, quant_method {method!r}). "
            f"Convert the 16-bit model it was made from; read are {', '.join(PACKINGS)}."
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
    # Dense models of some families say that they have one.
    experts = next((key for key in _EXPERT_KEYS if config.get(key) not in (None, 0, 1)), None)
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
