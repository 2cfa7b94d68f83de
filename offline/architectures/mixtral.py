# SPDX-License-Identifier: Apache-2.0
"""Mixtral: Mistral's attention, and experts in place of the feed-forward."""

from smoothrot_offline.architectures.base import Experts
from smoothrot_offline.architectures.mistral import MISTRAL

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
