# SPDX-License-Identifier: Apache-2.0
"""The table of Gemma 4, whose configuration decides which linears a layer has."""

from dataclasses import replace
from typing import TYPE_CHECKING

from smoothrot_offline.source.architecture import Architecture, sharing
from smoothrot_offline.source.families import GEMMA3
from smoothrot_offline.source.parts import HeadSizes
from smoothrot_offline.source.settings import check_size
from smoothrot_vllm.errors import UnsupportedModelError

if TYPE_CHECKING:  # the table must be there without the seconds that it takes
    from transformers import PreTrainedConfig

SLIDING, FULL = "sliding_attention", "full_attention"
_KEYS, _VALUES = "self_attn.k_proj", "self_attn.v_proj"
_LAYER_INPUT = {
    "per_layer_input_gate": ("layer_embedding", "hidden"),
    "per_layer_projection": ("hidden", "layer_embedding"),
}


def _of_config(table: Architecture, parsed: "PreTrainedConfig") -> Architecture:
    """The table of one model of the family.

    Raises:
        UnsupportedModelError: layers differ by more than a table says.
    """
    for kind in sorted(set(parsed.layer_types)):
        if not isinstance((rope := parsed.rope_parameters).get(kind), dict):
            raise UnsupportedModelError(
                f"config.json: rope_parameters: expected those of {kind} by that name, got {rope}."
                " Fetch config.json again."
            )
    if parsed.hidden_size_per_layer_input:
        table = _with_layer_embedding(table)
    kinds = {
        kind: replace(
            _with_keys_as_values(table) if parsed.attention_k_eq_v and kind == FULL else table,
            head_sizes=_head_sizes(parsed, kind),
        )
        for kind in sorted(set(parsed.layer_types))
    }
    shared = parsed.num_kv_shared_layers
    first = parsed.num_hidden_layers - shared
    for kind in sorted(set(parsed.layer_types[first:])) if shared else ():
        if first < 0 or kind not in parsed.layer_types[:first]:
            raise UnsupportedModelError(
                f"config.json: num_kv_shared_layers: expected a layer of {kind} before the last"
                f" {shared}, whose keys and values those share, got none. Fetch config.json again."
            )
        kinds[sharing(kind)] = _without_keys(kinds[kind])
    return replace(table, kinds=kinds)


def _head_sizes(parsed: "PreTrainedConfig", kind: str) -> HeadSizes:
    given = parsed.to_dict().get("per_layer_config") or {}
    for index, settings in sorted(given.items()):
        if other := sorted(settings.keys() - {"head_dim", "num_key_value_heads"}):
            raise UnsupportedModelError(
                f"config.json: per_layer_config: {other[0]}: expected head_dim and"
                f" num_key_value_heads alone to differ by layer, got {settings[other[0]]!r} for"
                f" layer {index}."
            )
    found = {
        HeadSizes(
            check_size("num_key_value_heads", layer.num_key_value_heads),
            check_size("head_dim", layer.head_dim),
        )
        for layer, own in zip(parsed.per_layer_config, parsed.layer_types, strict=True)
        if own == kind
    }
    if len(found) > 1:
        raise UnsupportedModelError(
            f"config.json: per_layer_config: expected the same heads in all layers of {kind}, got"
            f" {', '.join(f'{dim} wide with {kv} for keys' for kv, dim in sorted(found))}: no"
            " table says where a rotation of each is folded."
        )
    return found.pop()


def _with_layer_embedding(table: Architecture) -> Architecture:
    """Its first linear reads the residual stream as it is, with its outliers, and both are one or
    two hundredths of a layer: they stay 16-bit."""
    return replace(
        table,
        linears=table.linears | _LAYER_INPUT,
        sixteen_bit=tuple(_LAYER_INPUT),
        parameters=table.parameters | {"post_per_layer_input_norm.weight": ("hidden",)},
        layer_embedding="hidden_size_per_layer_input",
        beside={
            "model.embed_tokens_per_layer.weight": ("layer_vocab", "layer_embeddings"),
            "model.per_layer_model_projection.weight": ("layer_embeddings", "hidden"),
            "model.per_layer_projection_norm.weight": ("layer_embedding",),
        },
    )


def _with_keys_as_values(table: Architecture) -> Architecture:
    """Keys have RoPE, with which no rotation of values commutes."""
    return replace(_without(table, _VALUES), value="", repeated={_KEYS: _VALUES})


def _without_keys(table: Architecture) -> Architecture:
    without = _without(_without(table, _KEYS), _VALUES)
    return replace(without, value="", head_norms=("self_attn.q_norm",), repeated={})


def _without(table: Architecture, linear: str) -> Architecture:
    return replace(
        table,
        linears={name: shape for name, shape in table.linears.items() if name != linear},
        readers={
            norm: tuple(name for name in names if name != linear)
            for norm, names in table.readers.items()
        },
        biases={
            flag: tuple(name for name in names if name != linear)
            for flag, names in table.biases.items()
        },
    )


# A norm without a weight of its own is between each head's values and attention: a rotation of the
# head keeps its length, so R2 commutes with it.
GEMMA4 = replace(
    GEMMA3,
    model_type="gemma4_text",
    class_name="Gemma4ForCausalLM",
    norm_offset=0.0,
    parameters={"layer_scalar": ("one",)},
    ends_with_more=True,
    proportional_rope=True,
    shared_layers="num_kv_shared_layers",
    of_config=_of_config,
    settings={
        "hidden_activation": ("gelu_pytorch_tanh",),
        # vLLM's class reads them, transformers' has none.
        "attn_logit_softcapping": (None,),
        # Of images alone, which a text has none of.
        "use_bidirectional_attention": (None, "vision"),
        "enable_moe_block": (False,),
        "num_experts": (None,),
    },
)
