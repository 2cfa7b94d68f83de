# SPDX-License-Identifier: Apache-2.0
"""Gemma 2: Gemma 3's layer without head norms, with caps on attention's and the head's logits."""

from dataclasses import replace

from smoothrot_offline.architectures.gemma3 import GEMMA3

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
