# SPDX-License-Identifier: Apache-2.0
"""The tables of dense families whose layers all have the same linears."""

from dataclasses import replace

from smoothrot_offline.source.architecture import Architecture
from smoothrot_offline.source.parts import Multipliers

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
        "sliding_window": (None, 0),
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


# Of families that vLLM serves with transformers' own class: both read the same keys, and vLLM
# these for any class.
SERVED_BY_TRANSFORMERS: dict[str, tuple[object, ...]] = {
    "hidden_act": ("silu",),
    "logit_scale": (1.0,),
    "final_logit_softcapping": (None,),
    "attn_logit_softcapping": (None,),
}
WITHOUT_WINDOWS = {"sliding_window": (None, 0)}

SMOLLM3 = replace(
    LLAMA,
    model_type="smollm3",
    class_name="SmolLM3ForCausalLM",
    layer_types=True,
    settings=SERVED_BY_TRANSFORMERS,
    same={},
)


SEED_OSS = replace(
    LLAMA,
    model_type="seed_oss",
    class_name="SeedOssForCausalLM",
    biases={
        "attention_bias": LLAMA.readers["input_layernorm"],
        "attention_out_bias": ("self_attn.o_proj",),
        "mlp_bias": LLAMA.biases["mlp_bias"],
    },
    settings=SERVED_BY_TRANSFORMERS | WITHOUT_WINDOWS,
    same={},
)


HUNYUAN = replace(
    LLAMA,
    model_type="hunyuan_v1_dense",
    class_name="HunYuanDenseV1ForCausalLM",
    biases={"attention_bias": LLAMA.biases["attention_bias"]},
    head_norms=("self_attn.query_layernorm", "self_attn.key_layernorm"),
    settings=SERVED_BY_TRANSFORMERS | WITHOUT_WINDOWS,
    same={},
)


ERNIE = replace(
    LLAMA,
    model_type="ernie4_5",
    class_name="Ernie4_5ForCausalLM",
    biases={},
    # vLLM's class is Llama's, which does not know this family's flag for biases.
    settings=WITHOUT_BIASES | WITHOUT_WINDOWS | {"use_bias": (False,)},
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


OLMO2 = replace(
    LLAMA,
    model_type="olmo2",
    class_name="Olmo2ForCausalLM",
    biases={"attention_bias": LLAMA.biases["attention_bias"]},
    readers={
        "self_attn": LLAMA.readers["input_layernorm"],
        "mlp": LLAMA.readers["post_attention_layernorm"],
    },
    pre_norms=False,
    post_norms=("post_attention_layernorm", "post_feedforward_layernorm"),
    wide_norms={"self_attn.q_norm": "query", "self_attn.k_norm": "value"},
    settings=SERVED_BY_TRANSFORMERS | WITHOUT_WINDOWS,
    same={},
)


OLMO3 = replace(
    OLMO2,
    model_type="olmo3",
    class_name="Olmo3ForCausalLM",
    layer_types=True,
    settings=SERVED_BY_TRANSFORMERS,
)


EXAONE4 = replace(
    OLMO2,
    model_type="exaone4",
    class_name="Exaone4ForCausalLM",
    biases={},
    wide_norms={},
    head_norms=("self_attn.q_norm", "self_attn.k_norm"),
    layer_types=True,
    rope_in_windows=True,
    settings=WITHOUT_BIASES,
)


GLM = replace(
    LLAMA,
    model_type="glm",
    class_name="GlmForCausalLM",
    linears={
        name: shape
        for name, shape in LLAMA.linears.items()
        if name not in ("mlp.gate_proj", "mlp.up_proj")
    }
    | {"mlp.gate_up_proj": PHI3.linears["mlp.gate_up_proj"]},
    biases={"attention_bias": LLAMA.readers["input_layernorm"]},
    readers=LLAMA.readers | {"post_attention_layernorm": ("mlp.gate_up_proj",)},
    up="mlp.gate_up_proj",
    settings=SERVED_BY_TRANSFORMERS | WITHOUT_WINDOWS,
    same={},
    partial_rotary=True,
)


GLM4 = replace(
    GLM,
    model_type="glm4",
    class_name="Glm4ForCausalLM",
    post_norms=("post_self_attn_layernorm", "post_mlp_layernorm"),
    settings=WITHOUT_WINDOWS | {"hidden_act": ("silu",), "num_nextn_predict_layers": (0, None)},
)


MINISTRAL3 = replace(
    MISTRAL,
    model_type="ministral3",
    class_name="Ministral3ForCausalLM",
    settings={key: values for key, values in MISTRAL.settings.items() if key != "llama_4_scaling"},
    scaled_queries=True,
)
