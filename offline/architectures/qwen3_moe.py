# SPDX-License-Identifier: Apache-2.0
"""Qwen3-MoE: Qwen3's attention, and experts in place of every feed-forward."""

from dataclasses import replace

from smoothrot_offline.architectures.base import Experts
from smoothrot_offline.architectures.qwen3 import QWEN3

QWEN3_MOE = replace(
    QWEN3,
    model_type="qwen3_moe",
    class_name="Qwen3MoeForCausalLM",
    linears={name: shape for name, shape in QWEN3.linears.items() if name.startswith("self_attn.")}
    | {
        "mlp.gate": ("experts", "hidden"),
        "mlp.experts.{e}.gate_proj": ("intermediate", "hidden"),
        "mlp.experts.{e}.up_proj": ("intermediate", "hidden"),
        "mlp.experts.{e}.down_proj": ("hidden", "intermediate"),
    },
    readers={
        "input_layernorm": QWEN3.readers["input_layernorm"],
        "post_attention_layernorm": ("mlp.gate", "mlp.experts.{e}.gate_proj", "mlp.experts.{e}.up_proj"),
    },
    writers=("self_attn.o_proj", "mlp.experts.{e}.down_proj"),
    up="mlp.experts.{e}.up_proj",
    down="mlp.experts.{e}.down_proj",
    layer_types=False,
    experts=Experts(
        count="num_experts",
        intermediate="moe_intermediate_size",
        router="mlp.gate",
        gate="mlp.experts.{e}.gate_proj",
        normalises="norm_topk_prob",
        everywhere={"mlp_only_layers": [], "decoder_sparse_step": 1},
    ),
)
