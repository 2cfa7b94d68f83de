# SPDX-License-Identifier: Apache-2.0
"""Qwen3, the dense models: Llama's layer with norms of each query and key head before their
rotary embedding."""

from dataclasses import replace

from smoothrot_offline.architectures.llama import LLAMA

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
