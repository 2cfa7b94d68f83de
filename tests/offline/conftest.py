# SPDX-License-Identifier: Apache-2.0
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import FAMILIES, randomize_gemma4, scaled_queries, yarn
from transformers import AutoModelForCausalLM, PreTrainedModel

from smoothrot_offline.source.resolve import SUPPORTED

# Two kinds of width on purpose: 72 = 36·2 and 152 = 76·2 have Hadamard orders that are not
# symmetric matrices.
SIZES = {
    "vocab_size": 96,
    "hidden_size": 72,
    "intermediate_size": 152,
    "num_hidden_layers": 3,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}
# Heads wider than the hidden size has room for, windows in some layers, and a scale of attention
# that is no head's width.
GEMMA_SIZES: dict[str, Any] = {
    "head_dim": 12,
    "sliding_window": 5,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    "query_pre_attn_scalar": 20,
}
WINDOWS: dict[str, Any] = {
    name: value for name, value in GEMMA_SIZES.items() if name != "query_pre_attn_scalar"
}
# Heads are wider in layers of full attention, and the last of each kind shares keys and values.
GEMMA4_SIZES: dict[str, Any] = WINDOWS | {
    "num_hidden_layers": 4,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "global_head_dim": 20,
    "final_logit_softcapping": 3.0,
}
DELTA_SIZES: dict[str, Any] = {
    "head_dim": 16,
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 6,
    "linear_key_head_dim": 10,
    "linear_value_head_dim": 12,
}
# Transformers multiplies experts in whole runs of 16 bytes.
SHARED_SIZES = {
    "num_experts": 6,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 80,
    "shared_expert_intermediate_size": 112,
}
LATENT_SIZES: dict[str, Any] = {
    "num_key_value_heads": 9,
    "kv_lora_rank": 20,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 6,
    "v_head_dim": 12,
    **yarn(16, 4.0, mscale=0.707, mscale_all_dim=0.707),
    "first_k_dense_replace": 1,
    "n_routed_experts": 6,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 80,
    "n_shared_experts": 2,
    "routed_scaling_factor": 1.5,
}
OWN_SIZES: dict[str, dict[str, Any]] = {
    "gemma3": GEMMA_SIZES,
    "gemma4": GEMMA4_SIZES
    | {
        "hidden_size_per_layer_input": 10,
        "vocab_size_per_layer_input": 100,
        "num_kv_shared_layers": 2,
    },
    "gemma4_large": GEMMA4_SIZES
    | {
        "attention_k_eq_v": True,
        "num_global_key_value_heads": 1,
        "hidden_size_per_layer_input": 0,
    },
    # Caps low enough to matter; a model of this family has no head of its own.
    "gemma2": (
        GEMMA_SIZES
        | {
            "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 3.0,
            "tie_word_embeddings": True,
        }
    ),
    "qwen3": {"head_dim": 12},
    "qwen3_5": DELTA_SIZES,
    "qwen3_5_moe": DELTA_SIZES | SHARED_SIZES,
    "qwen3_next": DELTA_SIZES | SHARED_SIZES,
    "phi3": {"pad_token_id": 0},
    # A layer without experts, then two with them; groups of experts, of which one is left out.
    "glm4_moe": {
        "head_dim": 12,
        "n_routed_experts": 6,
        "num_experts_per_tok": 2,
        "n_group": 2,
        "topk_group": 1,
        "moe_intermediate_size": 80,
        "n_shared_experts": 2,
        "routed_scaling_factor": 1.5,
    },
    "deepseek_v2": LATENT_SIZES | {"q_lora_rank": None, "n_group": 1, "topk_group": 1},
    "deepseek_v3": LATENT_SIZES | {"q_lora_rank": 28, "n_group": 2, "topk_group": 1},
    "olmoe": {"num_experts": 6, "num_experts_per_tok": 2, "intermediate_size": 76},
    "mixtral": {"num_local_experts": 4},
    "qwen2_moe": SHARED_SIZES,
    "qwen3_moe": {
        "head_dim": 12,
        "num_experts": 6,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 76,
    },
    # None of them the one of a model without it.
    "granite": {
        "embedding_multiplier": 3.0,
        "attention_multiplier": 0.2,
        "residual_multiplier": 0.6,
        "logits_scaling": 2.0,
    },
    "seed_oss": {"head_dim": 12},
    "hunyuan_v1_dense": {"head_dim": 12},
    "ernie4_5": {"head_dim": 12},
    "glm": {"head_dim": 12, "pad_token_id": 0},
    "glm4": {"head_dim": 12, "pad_token_id": 0},
    "ministral3": {"head_dim": 12, **scaled_queries(8, 2.0)},
    "gpt_oss": {
        "head_dim": 12,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "sliding_window": 5,
        **yarn(16, 4.0, truncate=False),
    },
    "olmo2": {"head_dim": 12},
    "olmo3": WINDOWS,
    "exaone4": WINDOWS,
    "smollm3": {
        "pad_token_id": 0,
        "no_rope_layers": [1, 0, 1],
        "use_sliding_window": True,
        "sliding_window": 5,
    },
}


def random_model(
    family: str = "llama", dtype: torch.dtype = torch.bfloat16, **sizes: Any
) -> PreTrainedModel:
    """A small model whose every parameter is random: norm weights far from one, biases far from
    zero."""
    torch.manual_seed(1)
    config = FAMILIES[family](**SIZES | OWN_SIZES.get(family, {}) | sizes)
    model = AutoModelForCausalLM.from_config(
        config, attn_implementation=SUPPORTED[config.model_type].attention, dtype=dtype
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 2.0).sub_(SUPPORTED[config.model_type].norm_offset)
            elif name.endswith("bias"):
                parameter.normal_(std=0.5)
            else:
                parameter.normal_(std=parameter.shape[-1] ** -0.5)
        for name, buffer in model.named_buffers():
            if name.endswith("correction_bias"):
                # Which the published models have in float32.
                buffer.data = buffer.to(torch.promote_types(dtype, torch.float32))
                buffer.normal_(std=0.1)
    randomize_gemma4(model)
    return model.eval()


@pytest.fixture
def make_model(tmp_path: Path) -> Callable[..., Path]:
    """Saves a random model and returns its directory; ``shard`` limits its files, as in
    ``max_shard_size``."""

    def make(
        family: str = "llama", name: str = "model", shard: str = "1GB", **options: Any
    ) -> Path:
        random_model(family, **options).save_pretrained(tmp_path / name, max_shard_size=shard)
        return tmp_path / name

    return make


@pytest.fixture(scope="session")
def build_model() -> Callable[..., PreTrainedModel]:
    """:func:`random_model`, for tests that need no directory."""
    return random_model
