# SPDX-License-Identifier: Apache-2.0
"""The tables of GLM-4.5 and of DeepSeek V2 and V3: experts, chosen by groups of them, are behind
layers that have none. Keys and values of DeepSeek are made of a narrow latent state."""

from dataclasses import replace
from typing import TYPE_CHECKING

from smoothrot_offline.source.architecture import Architecture
from smoothrot_offline.source.families import LLAMA, QWEN3, WITHOUT_WINDOWS
from smoothrot_offline.source.parts import Experts, LatentAttention, Routing, SharedExpert
from smoothrot_vllm.errors import UnsupportedModelError

if TYPE_CHECKING:  # the tables must be there without the seconds that it takes
    from transformers import PreTrainedConfig


def _with_head_norms(table: Architecture, parsed: "PreTrainedConfig") -> Architecture:
    """The table of one model, which has norms of queries and keys if it says so."""
    norms = QWEN3.head_norms if parsed.use_qk_norm else ()
    kinds = {kind: replace(one, head_norms=norms) for kind, one in table.kinds.items()}
    return replace(table, head_norms=norms, kinds=kinds)


_GLM_DENSE = replace(
    LLAMA,
    biases={"attention_bias": LLAMA.readers["input_layernorm"]},
    same={},
    partial_rotary=True,
)

GLM4_MOE = _GLM_DENSE.with_sparse_feed_forward(
    Experts(
        count="n_routed_experts",
        intermediate="moe_intermediate_size",
        router="mlp.gate",
        gate="mlp.experts.{e}.gate_proj",
        normalizes="norm_topk_prob",
        dense="first_k_dense_replace",
        shared=SharedExpert(
            module="mlp.shared_experts",
            intermediate="moe_intermediate_size",
            count="n_shared_experts",
        ),
        routing=Routing(
            sigmoid=True,
            correction="e_score_correction_bias",
            groups="n_group",
            kept_groups="topk_group",
            of_group=2,
            scale="routed_scaling_factor",
        ),
    ),
    up="mlp.experts.{e}.up_proj",
    down="mlp.experts.{e}.down_proj",
    model_type="glm4_moe",
    class_name="Glm4MoeForCausalLM",
    parameters={"mlp.gate.e_score_correction_bias": ("experts",)},
    layers_behind="num_nextn_predict_layers",
    of_config=_with_head_norms,
    settings={
        **WITHOUT_WINDOWS,
        "hidden_act": ("silu",),
        # vLLM has no tied head.
        "tie_word_embeddings": (False,),
    },
    named_head_dim=True,
).behind_dense_layers(_GLM_DENSE)


_QUERY, _QUERY_A, _QUERY_B = (f"self_attn.{name}" for name in ("q_proj", "q_a_proj", "q_b_proj"))
_LATENT, _KEYS_VALUES = "self_attn.kv_a_proj_with_mqa", "self_attn.kv_b_proj"

_DENSE = replace(
    LLAMA,
    linears={
        _QUERY_A: ("query_rank", "hidden"),
        _QUERY_B: ("latent_query", "query_rank"),
        _LATENT: ("rank_rotary", "hidden"),
        _KEYS_VALUES: ("keys_values", "rank"),
        **{
            name: shape
            for name, shape in LLAMA.linears.items()
            if name not in LLAMA.readers["input_layernorm"]
        },
    },
    biases={},
    readers=LLAMA.readers | {"input_layernorm": (_QUERY_A, _LATENT)},
    value=_KEYS_VALUES,
    inner=((_QUERY_B,),),
    wide_norms={"self_attn.q_a_layernorm": "query_rank", "self_attn.kv_a_layernorm": "rank"},
    # The server multiplies its weight into queries and into what attention gives out.
    sixteen_bit=(_KEYS_VALUES,),
    latent_attention=LatentAttention(
        query_rank="q_lora_rank",
        rank="kv_lora_rank",
        keys="qk_nope_head_dim",
        rotary="qk_rope_head_dim",
        values="v_head_dim",
    ),
    same={},
)


def _of_config(table: Architecture, parsed: "PreTrainedConfig") -> Architecture:
    """The table of one model, whose queries are made of a latent state only if it has a rank."""
    if parsed.q_lora_rank is not None:
        return table
    kinds = {kind: _without_query_rank(one) for kind, one in table.kinds.items()}
    return replace(_without_query_rank(table), kinds=kinds)


def _of_config_v2(table: Architecture, parsed: "PreTrainedConfig") -> Architecture:
    """:func:`_of_config`.

    Raises:
        UnsupportedModelError: experts have groups that only the server chooses by.
    """
    if parsed.topk_method == "greedy" and parsed.n_group != 1:
        raise UnsupportedModelError(
            f"config.json: n_group: expected 1 with topk_method greedy (the server chooses by"
            f" groups, transformers does not), got {parsed.n_group!r}. Fetch config.json again."
        )
    return _of_config(table, parsed)


def _without_query_rank(table: Architecture) -> Architecture:
    left = {name: of for name, of in table.linears.items() if name not in (_QUERY_A, _QUERY_B)}
    return replace(
        table,
        linears={_QUERY: ("latent_query", "hidden")} | left,
        readers=table.readers | {"input_layernorm": (_QUERY, _LATENT)},
        inner=(),
        wide_norms={"self_attn.kv_a_layernorm": "rank"},
    )


_SETTINGS: dict[str, tuple[object, ...]] = {
    **WITHOUT_WINDOWS,
    "hidden_act": ("silu",),
    # transformers' class alone has biases then.
    "attention_bias": (False,),
    # The norms of latent states have this one in transformers' class, and the model's in vLLM's.
    "rms_norm_eps": (1e-6,),
    # vLLM has no tied head.
    "tie_word_embeddings": (False,),
    # vLLM's class, that of later models as well, reads these.
    "moe_layer_freq": (1,),
    "moe_router_dtype": (None, "float32"),
    "index_topk": (None,),
    "llama_4_scaling": (None,),
    "rswa_window": (None,),
}
_PLACE = {"up": GLM4_MOE.up, "down": GLM4_MOE.down}
assert GLM4_MOE.experts is not None

DEEPSEEK_V3 = _DENSE.with_sparse_feed_forward(
    GLM4_MOE.experts,
    **_PLACE,
    model_type="deepseek_v3",
    class_name="DeepseekV3ForCausalLM",
    parameters=GLM4_MOE.parameters,
    layers_behind="num_nextn_predict_layers",
    of_config=_of_config,
    settings={
        **_SETTINGS,
        "rope_interleave": (True,),
        "topk_method": ("noaux_tc", None),
        "scoring_func": ("sigmoid", None),
    },
    server_keys={"topk_method": "noaux_tc", "scoring_func": "sigmoid"},
).behind_dense_layers(_DENSE)


DEEPSEEK_V2 = _DENSE.with_sparse_feed_forward(
    replace(
        GLM4_MOE.experts,
        routing=Routing(groups="n_group", kept_groups="topk_group", scale="routed_scaling_factor"),
    ),
    **_PLACE,
    model_type="deepseek_v2",
    class_name="DeepseekV2ForCausalLM",
    of_config=_of_config_v2,
    settings={
        **_SETTINGS,
        "mlp_bias": (False,),
        # transformers' class never makes the weights of a token's experts sum to one.
        "norm_topk_prob": (False, None),
        "topk_method": ("greedy", "group_limited_greedy"),
        "scoring_func": ("softmax", None),
    },
).behind_dense_layers(_DENSE)
