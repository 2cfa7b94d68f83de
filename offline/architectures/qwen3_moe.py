# SPDX-License-Identifier: Apache-2.0
"""Qwen3-MoE: Qwen3's attention, and experts in place of every feed-forward."""

from smoothrot_offline.architectures.base import Experts
from smoothrot_offline.architectures.qwen3 import QWEN3

QWEN3_MOE = QWEN3.with_sparse_feed_forward(
    Experts(
        count="num_experts",
        intermediate="moe_intermediate_size",
        router="mlp.gate",
        gate="mlp.experts.{e}.gate_proj",
        normalises="norm_topk_prob",
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
