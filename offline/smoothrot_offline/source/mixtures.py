# SPDX-License-Identifier: Apache-2.0
"""The tables of families with a mixture of experts."""

from dataclasses import replace
from typing import Any

from smoothrot_offline.source.architecture import Architecture
from smoothrot_offline.source.families import (
    LLAMA,
    MISTRAL,
    OLMO2,
    QWEN2,
    QWEN3,
)
from smoothrot_offline.source.grouped_mixtures import DEEPSEEK_V2, DEEPSEEK_V3, GLM4_MOE
from smoothrot_offline.source.linear_attention import QWEN3_5, QWEN3_NEXT_DENSE
from smoothrot_offline.source.parts import Experts, SharedExpert

MAX_EXPERTS = 1 << 16
"""Of all layers: several times the largest model's, and what names of tensors can be written out
for."""

MIXTRAL = MISTRAL.with_sparse_feed_forward(
    model_type="mixtral",
    class_name="MixtralForCausalLM",
    settings={"hidden_act": ("silu",)},
    same={},
    up="block_sparse_moe.experts.{e}.w3",
    down="block_sparse_moe.experts.{e}.w2",
    experts=Experts(
        router="block_sparse_moe.gate",
        gate="block_sparse_moe.experts.{e}.w1",
        count="num_local_experts",
        intermediate="intermediate_size",
    ),
)


_QWEN_EXPERTS = Experts(
    count="num_experts",
    intermediate="moe_intermediate_size",
    router="mlp.gate",
    gate="mlp.experts.{e}.gate_proj",
    normalizes="norm_topk_prob",
    everywhere={"mlp_only_layers": [], "decoder_sparse_step": 1},
)
_SHARED_EXPERT = SharedExpert(
    module="mlp.shared_expert",
    intermediate="shared_expert_intermediate_size",
    gate="mlp.shared_expert_gate",
)

QWEN2_MOE = QWEN2.with_sparse_feed_forward(
    replace(_QWEN_EXPERTS, shared=_SHARED_EXPERT),
    up="mlp.experts.{e}.up_proj",
    down="mlp.experts.{e}.down_proj",
    model_type="qwen2_moe",
    class_name="Qwen2MoeForCausalLM",
    settings={
        "hidden_act": ("silu",),
        # vLLM's q, k and v always have one.
        "qkv_bias": (True,),
        # vLLM has one window for all layers, transformers in every other one.
        "use_sliding_window": (False,),
        "dual_chunk_attention_config": (None,),
    },
)


QWEN3_MOE = QWEN3.with_sparse_feed_forward(
    _QWEN_EXPERTS,
    up="mlp.experts.{e}.up_proj",
    down="mlp.experts.{e}.down_proj",
    model_type="qwen3_moe",
    class_name="Qwen3MoeForCausalLM",
    layer_types=False,
    one_window=False,
    settings={**QWEN3.settings, "shared_expert_intermediate_size": (0, None)},
)


def _sparse_qwen(table: Architecture, experts: Experts, **own: Any) -> Architecture:
    """The table of a model with layers of several kinds of attention, each with experts."""
    place = {"up": "mlp.experts.{e}.up_proj", "down": "mlp.experts.{e}.down_proj"}
    sparse = {
        kind: one.with_sparse_feed_forward(experts, **place) for kind, one in table.kinds.items()
    }
    return table.with_sparse_feed_forward(experts, **place, **own, kinds=sparse)


QWEN3_NEXT = _sparse_qwen(
    QWEN3_NEXT_DENSE,
    replace(_QWEN_EXPERTS, shared=_SHARED_EXPERT),
    model_type="qwen3_next",
    class_name="Qwen3NextForCausalLM",
)


QWEN3_5_MOE = _sparse_qwen(
    QWEN3_5,
    replace(_QWEN_EXPERTS, normalizes="", everywhere={}, shared=_SHARED_EXPERT),
    model_type="qwen3_5_moe_text",
    class_name="Qwen3_5MoeForCausalLM",
    settings={
        **QWEN3_5.settings,
        # vLLM's class, that of Qwen3-Next as well, reads these.
        "norm_topk_prob": (True, None),
        "mlp_only_layers": ([], None),
        "decoder_sparse_step": (1, None),
    },
)


OLMOE = LLAMA.with_sparse_feed_forward(
    Experts(
        count="num_experts",
        intermediate="intermediate_size",
        router="mlp.gate",
        gate="mlp.experts.{e}.gate_proj",
        normalizes="norm_topk_prob",
    ),
    up="mlp.experts.{e}.up_proj",
    down="mlp.experts.{e}.down_proj",
    model_type="olmoe",
    class_name="OlmoeForCausalLM",
    biases={},
    wide_norms=OLMO2.wide_norms,
    # vLLM's class reads none of these, but computes with these values.
    settings={
        "hidden_act": ("silu",),
        "attention_bias": (False,),
        "clip_qkv": (None,),
        "norm_topk_prob": (False,),
        "rms_norm_eps": (1e-5,),
        "tie_word_embeddings": (False,),
        "sliding_window": (None,),
    },
    same={},
    head_dim_from_hidden=True,
)


GPT_OSS = LLAMA.with_sparse_feed_forward(
    Experts(
        count="num_local_experts",
        intermediate="intermediate_size",
        router="mlp.router",
        # vLLM's class would take a down_proj for a tensor of its own.
        gate="mlp.experts.{e}.w1",
        activation="swigluoai",
        biased=True,
        interleaved=True,
        gives_scores=True,
    ),
    up="mlp.experts.{e}.w3",
    down="mlp.experts.{e}.w2",
    model_type="gpt_oss",
    class_name="GptOssForCausalLM",
    biases={"": LLAMA.biases["attention_bias"]},
    parameters={"self_attn.sinks": ("heads",)},
    layer_types=True,
    alternating_yarn=True,
    plain_head=True,
    attention="eager",
    # vLLM's class reads none of these, but computes with these values.
    settings={
        "hidden_act": ("silu",),
        "attention_bias": (True,),
        "swiglu_alpha": (1.702,),
        "swiglu_limit": (7.0,),
        "rms_norm_eps": (1e-5,),
        "tie_word_embeddings": (False,),
    },
    same={},
)


MIXTURES = {
    table.model_type: table
    for table in (
        MIXTRAL,
        QWEN2_MOE,
        QWEN3_MOE,
        QWEN3_NEXT,
        QWEN3_5_MOE,
        OLMOE,
        GPT_OSS,
        GLM4_MOE,
        DEEPSEEK_V2,
        DEEPSEEK_V3,
    )
}
