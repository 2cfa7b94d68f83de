# SPDX-License-Identifier: Apache-2.0
"""The table of each family that converts."""

from dataclasses import replace

from smoothrot_offline.source.family import Architecture, Experts, Multipliers

LLAMA = Architecture(
    model_type="llama",
    class_name="LlamaForCausalLM",
    linears={
        "self_attn.q_proj": ("query", "hidden"),
        "self_attn.k_proj": ("value", "hidden"),
        "self_attn.v_proj": ("value", "hidden"),
        "self_attn.o_proj": ("hidden", "query"),
        "mlp.gate_proj": ("intermediate", "hidden"),
        "mlp.up_proj": ("intermediate", "hidden"),
        "mlp.down_proj": ("hidden", "intermediate"),
    },
    biases={
        "attention_bias": (
            "self_attn.q_proj",
            "self_attn.k_proj",
            "self_attn.v_proj",
            "self_attn.o_proj",
        ),
        "mlp_bias": ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"),
    },
    readers={
        "input_layernorm": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        "post_attention_layernorm": ("mlp.gate_proj", "mlp.up_proj"),
    },
    writers=("self_attn.o_proj", "mlp.down_proj"),
    value="self_attn.v_proj",
    output="self_attn.o_proj",
    up="mlp.up_proj",
    down="mlp.down_proj",
    # vLLM's class reads these beside the flags of transformers' class.
    settings={
        "hidden_act": ("silu",),
        "bias": (False, None),
        "logit_scale": (1.0,),
        "sliding_window": (None, 0),
    },
    same={"qkv_bias": "attention_bias"},
)


GRANITE = replace(
    LLAMA,
    model_type="granite",
    class_name="GraniteForCausalLM",
    multipliers=Multipliers(
        embedding="embedding_multiplier", residual="residual_multiplier", logits="logits_scaling"
    ),
    settings={
        "hidden_act": ("silu",),
        "bias": (False, None),
        "logit_scale": (1.0,),
        # Of the same class of vLLM's for models with windows, sinks and layers without RoPE.
        "attention_sinks": (False,),
        "layer_rope_theta": (None,),
    },
    same={},
)


# What vLLM's class reads for the biases of a Llama, which transformers' classes of these families
# never have.
WITHOUT_BIASES = {
    **{key: values for key, values in LLAMA.settings.items() if key != "sliding_window"},
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
}

MISTRAL = replace(
    LLAMA,
    model_type="mistral",
    class_name="MistralForCausalLM",
    biases={},
    settings=WITHOUT_BIASES | {"llama_4_scaling": (None,), "ada_rms_norm_t_cond": (False, None)},
)


QWEN2 = replace(
    LLAMA,
    model_type="qwen2",
    class_name="Qwen2ForCausalLM",
    biases={"": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")},
    layer_types=True,
    settings={
        "hidden_act": ("silu",),
        "qk_norm": (False, None),
        "dual_chunk_attention_config": (None,),
    },
    same={},
    one_window=True,
    head_dim_from_hidden=True,
)


QWEN3 = replace(
    LLAMA,
    model_type="qwen3",
    class_name="Qwen3ForCausalLM",
    biases={},
    head_norms=("self_attn.q_norm", "self_attn.k_norm"),
    layer_types=True,
    settings={
        "hidden_act": ("silu",),
        # transformers gives o_proj a bias then, vLLM does not.
        "attention_bias": (False,),
        # vLLM has one window for all layers.
        "use_sliding_window": (False,),
        "dual_chunk_attention_config": (None,),
    },
    same={},
    one_window=True,
)


PHI3 = replace(
    LLAMA,
    model_type="phi3",
    class_name="Phi3ForCausalLM",
    linears={
        "self_attn.qkv_proj": ("query_key_value", "hidden"),
        "mlp.gate_up_proj": ("gate_up", "hidden"),
        **{writer: LLAMA.linears[writer] for writer in LLAMA.writers},
    },
    biases={},
    readers={
        "input_layernorm": ("self_attn.qkv_proj",),
        "post_attention_layernorm": ("mlp.gate_up_proj",),
    },
    value="self_attn.qkv_proj",
    up="mlp.gate_up_proj",
    settings=WITHOUT_BIASES,
    partial_rotary=True,
    replaced_code=(
        "modeling_phi3.Phi3ForCausalLM",
        "modeling_phi3.Phi3Model",
        "configuration_phi3.Phi3Config",
    ),
)


# vLLM serves it with transformers' own class: both read the same keys.
SMOLLM3 = replace(
    LLAMA,
    model_type="smollm3",
    class_name="SmolLM3ForCausalLM",
    layer_types=True,
    settings={"hidden_act": ("silu",)},
    same={},
)


GEMMA3 = replace(
    LLAMA,
    model_type="gemma3_text",
    class_name="Gemma3ForCausalLM",
    biases={"attention_bias": LLAMA.biases["attention_bias"]},
    readers={
        "input_layernorm": LLAMA.readers["input_layernorm"],
        "pre_feedforward_layernorm": LLAMA.readers["post_attention_layernorm"],
    },
    post_norms=("post_attention_layernorm", "post_feedforward_layernorm"),
    head_norms=("self_attn.q_norm", "self_attn.k_norm"),
    norm_offset=1.0,
    scaled_embedding=True,
    layer_types=True,
    same={},
    settings={
        "hidden_activation": ("gelu_pytorch_tanh",),
        # transformers and vLLM both ignore a cap on attention's logits.
        "attn_logit_softcapping": (None,),
        "use_bidirectional_attention": (None, False),
    },
)


GEMMA2 = replace(
    GEMMA3,
    model_type="gemma2",
    class_name="Gemma2ForCausalLM",
    head_norms=(),
    settings={
        "hidden_activation": ("gelu_pytorch_tanh",),
        "use_bidirectional_attention": (None, False),
        "tie_word_embeddings": (True,),
    },
    head_is_embedding=True,
    attention="eager",
)


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


QWEN3_MOE = QWEN3.with_sparse_feed_forward(
    Experts(
        count="num_experts",
        intermediate="moe_intermediate_size",
        router="mlp.gate",
        gate="mlp.experts.{e}.gate_proj",
        normalizes="norm_topk_prob",
        everywhere={"mlp_only_layers": [], "decoder_sparse_step": 1},
    ),
    up="mlp.experts.{e}.up_proj",
    down="mlp.experts.{e}.down_proj",
    model_type="qwen3_moe",
    class_name="Qwen3MoeForCausalLM",
    layer_types=False,
    one_window=False,
    settings={**QWEN3.settings, "shared_expert_intermediate_size": (0, None)},
)
