# SPDX-License-Identifier: Apache-2.0
"""Llama family: Llama 2 and 3, SmolLM2, and every model whose configuration says ``model_type:
llama``."""

from smoothrot_offline.architectures.base import Architecture

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
