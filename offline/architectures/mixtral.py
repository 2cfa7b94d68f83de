# SPDX-License-Identifier: Apache-2.0
"""Mixtral: Mistral's attention, and experts in place of the feed-forward."""

from dataclasses import replace

from smoothrot_offline.architectures.base import Experts
from smoothrot_offline.architectures.mistral import MISTRAL

MIXTRAL = replace(
    MISTRAL,
    model_type="mixtral",
    class_name="MixtralForCausalLM",
    linears={name: shape for name, shape in MISTRAL.linears.items() if name.startswith("self_attn.")}
    | {
        "block_sparse_moe.gate": ("experts", "hidden"),
        "block_sparse_moe.experts.{e}.w1": ("intermediate", "hidden"),
        "block_sparse_moe.experts.{e}.w3": ("intermediate", "hidden"),
        "block_sparse_moe.experts.{e}.w2": ("hidden", "intermediate"),
    },
    readers={
        "input_layernorm": MISTRAL.readers["input_layernorm"],
        "post_attention_layernorm": (
            "block_sparse_moe.gate",
            "block_sparse_moe.experts.{e}.w1",
            "block_sparse_moe.experts.{e}.w3",
        ),
    },
    writers=("self_attn.o_proj", "block_sparse_moe.experts.{e}.w2"),
    up="block_sparse_moe.experts.{e}.w3",
    down="block_sparse_moe.experts.{e}.w2",
    experts=Experts(
        count="num_local_experts",
        intermediate="intermediate_size",
        router="block_sparse_moe.gate",
        gate="block_sparse_moe.experts.{e}.w1",
    ),
)
