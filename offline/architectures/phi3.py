# SPDX-License-Identifier: Apache-2.0
"""Phi-3, Phi-3.5 and Phi-4: Llama's layer with q, k and v in one linear, and gate and up in
another."""

from dataclasses import replace

from smoothrot_offline.architectures.llama import LLAMA
from smoothrot_offline.architectures.mistral import WITHOUT_BIASES

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
