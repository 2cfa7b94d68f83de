# SPDX-License-Identifier: Apache-2.0
"""Models of each family with its odd shapes and settings: arguments of ``random_model``."""

from typing import Any

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
    "mixtral": {"family": "mixtral"},
    "granite": {"family": "granite"},
    "granite, all biases, tied": {
        "family": "granite",
        "attention_bias": True,
        "mlp_bias": True,
        "tie_word_embeddings": True,
    },
    "qwen3_moe, tied": {"family": "qwen3_moe", "tie_word_embeddings": True},
}
