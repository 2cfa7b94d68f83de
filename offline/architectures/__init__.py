# SPDX-License-Identifier: Apache-2.0
"""Which model families can be converted: one table each, and the refusal of everything else by name."""

from typing import Any

from transformers import PreTrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from smoothrot_offline.architectures.base import Architecture, Experts, ModelSpec
from smoothrot_offline.architectures.gemma2 import GEMMA2
from smoothrot_offline.architectures.gemma3 import GEMMA3
from smoothrot_offline.architectures.llama import LLAMA
from smoothrot_offline.architectures.mistral import MISTRAL
from smoothrot_offline.architectures.mixtral import MIXTRAL
from smoothrot_offline.architectures.phi3 import PHI3
from smoothrot_offline.architectures.qwen2 import QWEN2
from smoothrot_offline.architectures.qwen3 import QWEN3
from smoothrot_offline.architectures.qwen3_moe import QWEN3_MOE
from smoothrot_offline.architectures.smollm3 import SMOLLM3
from smoothrot_offline.foreign_models import parse_config
from smoothrot_vllm.errors import UnsupportedModelError

__all__ = ["SUPPORTED", "Architecture", "ModelSpec", "resolve"]

_TABLES = (LLAMA, MISTRAL, QWEN2, QWEN3, PHI3, SMOLLM3, GEMMA2, GEMMA3, MIXTRAL, QWEN3_MOE)
SUPPORTED = {table.model_type: table for table in _TABLES}
MAX_SIZE = (1 << 31) - 1
"""Of a width or a count in a configuration."""
MAX_EXPERTS = 1 << 17
"""Of all layers: several times the largest model's, and what names of tensors can be written out for."""
_EXPERT_KEYS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_intermediate_size")


def resolve(config: dict[str, Any]) -> ModelSpec:
    """The family and the sizes of a model.

    Args:
        config: ``config.json`` as read.

    Raises:
        UnsupportedModelError: the model cannot be converted exactly; the message names the reason.
    """
    table = _supported_table(config)
    parsed = parse_config(config, table.model_type)
    layers, hidden, heads = (_size(parsed, key) for key in ("num_hidden_layers", "hidden_size", "num_attention_heads"))
    experts = 0 if table.experts is None else _count_experts(table.experts, parsed, layers)
    spec = ModelSpec(
        architecture=table.with_experts(experts),
        config=parsed,
        layers=layers,
        hidden=hidden,
        intermediate=_size(parsed, table.experts.intermediate if table.experts else "intermediate_size"),
        heads=heads,
        kv_heads=_size(parsed, "num_key_value_heads"),
        # Qwen2's configuration class has no default for it.
        head_dim=_size(parsed, "head_dim") if getattr(parsed, "head_dim", None) is not None else hidden // heads,
        vocab=_size(parsed, "vocab_size"),
        tied=bool(parsed.tie_word_embeddings),
        experts=experts,
    )
    if spec.heads % spec.kv_heads:
        raise UnsupportedModelError(
            f"config.json: expected {spec.heads} attention heads to be a multiple of {spec.kv_heads} key-value heads."
        )
    for rope in _rope_types(parsed.rope_parameters):
        if rope not in ("default", *ROPE_INIT_FUNCTIONS):
            raise UnsupportedModelError(
                f"config.json: rope_type: expected one of default, {', '.join(ROPE_INIT_FUNCTIONS)}, got {rope!r}."
            )
    for key, values in table.settings.items():
        if (found := getattr(parsed, key)) not in values:
            raise UnsupportedModelError(
                f"config.json: {key}: expected one of {', '.join(map(str, values))} (what the server runs for "
                f"{table.class_name}), got {found!r}."
            )
    return spec


def _size(parsed: PreTrainedConfig, key: str) -> int:
    found = getattr(parsed, key)
    if type(found) is not int or not 1 <= found <= MAX_SIZE:
        raise UnsupportedModelError(
            f"config.json: {key}: expected a whole number from 1 to {MAX_SIZE}, got {found!r}. Fetch config.json again."
        )
    return found


def _count_experts(experts: Experts, parsed: PreTrainedConfig, layers: int) -> int:
    count, chosen = _size(parsed, experts.count), parsed.num_experts_per_tok
    if layers * count > MAX_EXPERTS:
        raise UnsupportedModelError(
            f"config.json: {experts.count}: expected at most {MAX_EXPERTS} in all layers, got {count} in each of {layers}."
        )
    if type(chosen) is not int or not 1 <= chosen <= count:
        raise UnsupportedModelError(
            f"config.json: num_experts_per_tok: expected 1 to {experts.count} = {count} experts for each token, got {chosen}."
        )
    for key, value in experts.everywhere.items():
        if (found := getattr(parsed, key)) != value:
            raise UnsupportedModelError(
                f"config.json: {key}: expected {value!r}, experts in every layer, got {found!r}: a model that mixes layers "
                "with and without experts is not converted."
            )
    return int(count)


def _rope_types(parameters: Any) -> list[Any]:
    """The rope type, or that of each kind of layer where the parameters differ by kind."""
    if not isinstance(parameters, dict):
        return [parameters or "default"]
    by_kind = [nested for nested in parameters.values() if isinstance(nested, dict)]
    return [found.get("rope_type", "default") for found in by_kind or [parameters]]


def _supported_table(config: dict[str, Any]) -> Architecture:
    model_type = config.get("model_type")
    classes = config.get("architectures") or []
    if not isinstance(model_type, str | None) or not isinstance(classes, list) or not all(isinstance(c, str) for c in classes):
        raise UnsupportedModelError(
            f"config.json: expected a text as model_type and a list of texts as architectures, got {model_type!r}, {classes!r}."
        )
    names = ", ".join(classes or [str(model_type)])
    quantization = config.get("quantization_config")
    if quantization is not None:
        method = quantization.get("quant_method", "unknown") if isinstance(quantization, dict) else quantization
        raise UnsupportedModelError(
            f"{names} is already quantised (quantization_config, quant_method {method!r}). "
            "Convert the 16-bit model it was made from."
        )
    table = SUPPORTED.get(model_type) if isinstance(model_type, str) else None
    if own_code := _own_code(config, table):
        raise UnsupportedModelError(
            f"{names} needs its own Python code (auto_map in config.json: {own_code}), which is never run. "
            "Convert a model whose architecture transformers itself implements."
        )
    experts = next((key for key in _EXPERT_KEYS if config.get(key)), None)
    if experts is not None and (table is None or table.experts is None):
        mixtures = ", ".join(known.class_name for known in _TABLES if known.experts is not None)
        raise UnsupportedModelError(
            f"{names} is a mixture of experts ({experts} = {config[experts]}): of those, only {mixtures} convert."
        )
    if table is None:
        raise UnsupportedModelError(
            f"{names} (model_type {model_type!r}) is not supported: no table says where its transforms are folded "
            f"(docs/architectures.md). Supported model types: {', '.join(SUPPORTED)}."
        )
    if classes and classes != [table.class_name]:
        raise UnsupportedModelError(
            f"config.json: architectures: expected {table.class_name} for model_type {model_type!r}, got {', '.join(classes)}."
        )
    if not table.layer_types and config.get("layer_types"):
        raise UnsupportedModelError(
            f"{names} mixes attention kinds (layer_types), which transformers ignores for {model_type!r}."
        )
    return table


def _own_code(config: dict[str, Any], table: Architecture | None) -> str | None:
    """The Python class that a configuration asks for in place of the one of transformers."""
    own = config.get("auto_map")
    if not own:
        return None
    code = str(own.get("AutoModelForCausalLM", own) if isinstance(own, dict) else own)
    return None if table is not None and code in table.replaced_code else code
