# SPDX-License-Identifier: Apache-2.0
"""Models of each family with its odd shapes and settings: arguments of ``random_model``."""

from typing import Any

from tiny_models import FAMILIES

from smoothrot_offline.source.resolve import SUPPORTED

MODELS: dict[str, dict[str, Any]] = {
    "llama": {"family": "llama"},
    "llama, all biases, tied": {
        "family": "llama",
        "attention_bias": True,
        "mlp_bias": True,
        "tie_word_embeddings": True,
    },
    "llama, one key-value head": {"family": "llama", "num_key_value_heads": 1},
    "llama, widths with blocks of 2 only": {
        "family": "llama",
        "hidden_size": 70,
        "num_attention_heads": 5,
        "num_key_value_heads": 5,
        "intermediate_size": 140,
    },
    "mistral, window, wide heads": {"family": "mistral", "head_dim": 12, "sliding_window": 5},
    "qwen2": {"family": "qwen2"},
    "qwen2, tied, windows": {
        "family": "qwen2",
        "tie_word_embeddings": True,
        "use_sliding_window": True,
        "sliding_window": 5,
        "max_window_layers": 0,
    },
    "qwen3": {"family": "qwen3"},
    "qwen3_5": {"family": "qwen3_5"},
    "qwen3_5, tied, one key-value head, as many key as value heads": {
        "family": "qwen3_5",
        "num_key_value_heads": 1,
        "linear_num_key_heads": 3,
        "linear_num_value_heads": 3,
        "linear_conv_kernel_dim": 3,
        "tie_word_embeddings": True,
    },
    "phi3": {"family": "phi3"},
    "phi3, one key-value head, half of each rotary, tied": {
        "family": "phi3",
        "num_key_value_heads": 1,
        "rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5},
        "tie_word_embeddings": True,
    },
    "smollm3, all biases": {"family": "smollm3", "attention_bias": True, "mlp_bias": True},
    "gemma2": {"family": "gemma2"},
    "gemma2, biases": {"family": "gemma2", "attention_bias": True},
    "gemma3": {"family": "gemma3"},
    "gemma3, biases, tied, one key-value head": {
        "family": "gemma3",
        "attention_bias": True,
        "tie_word_embeddings": True,
        "num_key_value_heads": 1,
    },
    "gemma4": {"family": "gemma4"},
    "gemma4, biases, tied, no window": {
        "family": "gemma4",
        "attention_bias": True,
        "tie_word_embeddings": True,
        "layer_types": ["full_attention"] * 4,
    },
    "gemma4, one head for all": {
        "family": "gemma4",
        "num_kv_shared_layers": 1,
        "num_key_value_heads": 1,
        "global_head_dim": 12,
        "hidden_size_per_layer_input": 0,
    },
    "gemma4_large": {"family": "gemma4_large"},
    "gemma4, keys as values, shared, biases": {
        "family": "gemma4_large",
        "num_kv_shared_layers": 2,
        "attention_bias": True,
        "hidden_size_per_layer_input": 10,
        "vocab_size_per_layer_input": 96,
    },
    "mixtral": {"family": "mixtral"},
    "granite": {"family": "granite"},
    "granite, all biases, tied": {
        "family": "granite",
        "attention_bias": True,
        "mlp_bias": True,
        "tie_word_embeddings": True,
    },
    "seed_oss": {"family": "seed_oss"},
    "seed_oss, all biases, tied": {
        "family": "seed_oss",
        "attention_out_bias": True,
        "mlp_bias": True,
        "tie_word_embeddings": True,
    },
    "hunyuan_v1_dense": {"family": "hunyuan_v1_dense"},
    "hunyuan_v1_dense, biases, tied, dynamic": {
        "family": "hunyuan_v1_dense",
        "attention_bias": True,
        "tie_word_embeddings": True,
        "rope_parameters": {"rope_type": "dynamic", "factor": 1.0, "alpha": 50.0},
    },
    "ernie4_5": {"family": "ernie4_5"},
    "ernie4_5, tied": {"family": "ernie4_5", "tie_word_embeddings": True},
    "glm": {"family": "glm"},
    "glm, no biases, one key-value head, tied": {
        "family": "glm",
        "attention_bias": False,
        "num_key_value_heads": 1,
        "tie_word_embeddings": True,
    },
    "glm4": {"family": "glm4"},
    "glm4, no biases, tied": {
        "family": "glm4",
        "attention_bias": False,
        "tie_word_embeddings": True,
    },
    "ministral3": {"family": "ministral3"},
    "ministral3, window, tied": {
        "family": "ministral3",
        "sliding_window": 5,
        "tie_word_embeddings": True,
    },
    "olmo2": {"family": "olmo2"},
    "olmo2, biases, tied": {
        "family": "olmo2",
        "attention_bias": True,
        "tie_word_embeddings": True,
    },
    "olmo3": {"family": "olmo3"},
    "exaone4": {"family": "exaone4"},
    "exaone4, one window for none, tied": {
        "family": "exaone4",
        "sliding_window": None,
        "layer_types": ["full_attention"] * 3,
        "tie_word_embeddings": True,
    },
    "olmoe": {"family": "olmoe"},
    "gpt_oss": {"family": "gpt_oss"},
    "gpt_oss, one key-value head": {"family": "gpt_oss", "num_key_value_heads": 1},
    "qwen2_moe": {"family": "qwen2_moe"},
    "qwen2_moe, weights of experts that sum to one, tied": {
        "family": "qwen2_moe",
        "norm_topk_prob": True,
        "tie_word_embeddings": True,
    },
    "qwen3_next": {"family": "qwen3_next"},
    "qwen3_next, weights of experts as they are, one key-value head": {
        "family": "qwen3_next",
        "norm_topk_prob": False,
        "num_key_value_heads": 1,
        "linear_num_key_heads": 3,
        "linear_num_value_heads": 3,
    },
    "qwen3_5_moe": {"family": "qwen3_5_moe"},
    "qwen3_5_moe, tied": {"family": "qwen3_5_moe", "tie_word_embeddings": True},
    "glm4_moe": {"family": "glm4_moe"},
    "glm4_moe, head norms, biases, weights of experts as they are": {
        "family": "glm4_moe",
        "use_qk_norm": True,
        "attention_bias": True,
        "norm_topk_prob": False,
        "first_k_dense_replace": 2,
    },
    "glm4_moe, experts in every layer and in one group": {
        "family": "glm4_moe",
        "first_k_dense_replace": 0,
        "n_group": 1,
        "n_shared_experts": 1,
        "num_key_value_heads": 1,
    },
    "deepseek_v2": {"family": "deepseek_v2"},
    "deepseek_v2, latent queries, groups of experts, plain RoPE": {
        "family": "deepseek_v2",
        "q_lora_rank": 28,
        "topk_method": "group_limited_greedy",
        "n_group": 3,
        "topk_group": 2,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    },
    "deepseek_v3": {"family": "deepseek_v3"},
    "deepseek_v3, no latent queries, experts in every layer": {
        "family": "deepseek_v3",
        "q_lora_rank": None,
        "first_k_dense_replace": 0,
        "norm_topk_prob": False,
    },
    "qwen3_moe, tied": {"family": "qwen3_moe", "tie_word_embeddings": True},
}

TABLES = {name: SUPPORTED[FAMILIES[model["family"]].model_type] for name, model in MODELS.items()}
FOLDED = [name for name, table in TABLES.items() if table.rotates_residual]
"""Those whose residual stream R1 is folded into."""
NORMED = [name for name, table in TABLES.items() if table.norms]
"""Those whose linears read norms."""
SMOOTHED = [name for name, table in TABLES.items() if table.scales_products]
"""Those whose down_proj reads a product that S can be folded into."""
