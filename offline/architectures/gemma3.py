# SPDX-License-Identifier: Apache-2.0
"""Gemma 3, the text models: Llama's linears between norms on both sides, and norms of each query
and key head."""

from dataclasses import replace

from smoothrot_offline.architectures.llama import LLAMA

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
