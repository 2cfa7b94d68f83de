# SPDX-License-Identifier: Apache-2.0
"""Qwen2 and Qwen2.5: Llama's layer with biases on q, k and v only."""

from dataclasses import replace

from smoothrot_offline.architectures.llama import LLAMA

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
