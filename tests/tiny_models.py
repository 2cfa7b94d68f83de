# SPDX-License-Identifier: Apache-2.0
"""Small random models made on the fly, and the converter as a user calls it."""

import sys
from pathlib import Path
from typing import Any

import torch
from forked import COMMAND, run_forked
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    DeepseekV2Config,
    DeepseekV3Config,
    Ernie4_5Config,
    Exaone4Config,
    Gemma2Config,
    Gemma3TextConfig,
    Gemma4TextConfig,
    Glm4Config,
    Glm4MoeConfig,
    GlmConfig,
    GptOssConfig,
    GraniteConfig,
    HunYuanDenseV1Config,
    LlamaConfig,
    Ministral3Config,
    MistralConfig,
    MixtralConfig,
    Olmo2Config,
    Olmo3Config,
    OlmoeConfig,
    Phi3Config,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen3_5MoeTextConfig,
    Qwen3_5TextConfig,
    Qwen3Config,
    Qwen3MoeConfig,
    Qwen3NextConfig,
    SeedOssConfig,
    SmolLM3Config,
)

from smoothrot_offline.source.resolve import SUPPORTED

REPOSITORY = Path(__file__).parents[1]
BIN = Path(sys.executable).parent
CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SHORT_TEXT = REPOSITORY / "benchmarks" / "demo" / "text.txt"
FAMILIES = {
    "llama": LlamaConfig,
    "mistral": MistralConfig,
    "qwen2": Qwen2Config,
    "qwen3": Qwen3Config,
    "qwen3_5": Qwen3_5TextConfig,
    "phi3": Phi3Config,
    "smollm3": SmolLM3Config,
    "gemma2": Gemma2Config,
    "gemma3": Gemma3TextConfig,
    # As the small ones of the family, and as the large dense one.
    "gemma4": Gemma4TextConfig,
    "gemma4_large": Gemma4TextConfig,
    "mixtral": MixtralConfig,
    "qwen2_moe": Qwen2MoeConfig,
    "qwen3_moe": Qwen3MoeConfig,
    "qwen3_next": Qwen3NextConfig,
    "qwen3_5_moe": Qwen3_5MoeTextConfig,
    "granite": GraniteConfig,
    "seed_oss": SeedOssConfig,
    "hunyuan_v1_dense": HunYuanDenseV1Config,
    "ernie4_5": Ernie4_5Config,
    "glm": GlmConfig,
    "glm4": Glm4Config,
    "ministral3": Ministral3Config,
    "olmo2": Olmo2Config,
    "olmo3": Olmo3Config,
    "exaone4": Exaone4Config,
    "olmoe": OlmoeConfig,
    "glm4_moe": Glm4MoeConfig,
    # As the Lite model of the family, whose queries have no latent state, and as V3.
    "deepseek_v2": DeepseekV2Config,
    "deepseek_v3": DeepseekV3Config,
    "gpt_oss": GptOssConfig,
}


def yarn(context: int, factor: float, **own: Any) -> dict[str, Any]:
    """Settings of a model that was trained on ``context`` tokens and reads ``factor`` times as
    many; ``own`` are further rotary parameters of its family."""
    return {
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": factor,
            "original_max_position_embeddings": context,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            **own,
        },
    }


def scaled_queries(context: int, factor: float) -> dict[str, Any]:
    """Settings of a model whose queries grow beyond ``context`` tokens."""
    return {
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": factor,
            "original_max_position_embeddings": context,
            "llama_4_scaling_beta": 0.5,
        },
    }


# A hidden size of 160 = 20 * 8 needs a Hadamard base where it is rotated online; the window is
# shorter than most prompts.
GEMMA_SIZES: dict[str, Any] = {
    "hidden_size": 160,
    "head_dim": 64,
    "layer_types": ["sliding_attention", "full_attention"],
    "sliding_window": 16,
    "query_pre_attn_scalar": 100,
}
# Heads are wider in layers of full attention.
GEMMA4_SIZES: dict[str, Any] = {
    "hidden_size": 160,
    "head_dim": 64,
    "global_head_dim": 128,
    "num_hidden_layers": 4,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "sliding_window": 16,
    "final_logit_softcapping": 10.0,
    "hidden_size_per_layer_input": 0,
}
# vLLM's kernels for CPUs take heads of 64 and 128 in linear attention.
DELTA_SIZES: dict[str, Any] = {
    "head_dim": 64,
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 64,
    "linear_value_head_dim": 64,
}
SHARED_SIZES = {
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 96,
    "shared_expert_intermediate_size": 224,
}
# vLLM's kernel for CPUs takes these ranks and parts with RoPE alone.
LATENT_SIZES: dict[str, Any] = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 512,
    "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 32,
    "v_head_dim": 48,
    **yarn(16, 4.0, mscale=0.707, mscale_all_dim=0.707),
    "first_k_dense_replace": 1,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 96,
    "n_shared_experts": 2,
    "routed_scaling_factor": 1.5,
    "tie_word_embeddings": False,
}
# Caps of logits are low enough to matter; so are the factors of longrope, on the rotated half of
# each head of 32.
OWN_SIZES: dict[str, dict[str, Any]] = {
    "gemma3": GEMMA_SIZES,
    "gemma4": GEMMA4_SIZES
    | {
        "hidden_size_per_layer_input": 32,
        "vocab_size_per_layer_input": 512,
        "num_kv_shared_layers": 2,
    },
    "gemma4_large": GEMMA4_SIZES | {"attention_k_eq_v": True, "num_global_key_value_heads": 1},
    "gemma2": GEMMA_SIZES | {"attn_logit_softcapping": 3.0, "final_logit_softcapping": 10.0},
    "qwen3": {"head_dim": 64},
    "qwen3_5": DELTA_SIZES,
    "qwen3_5_moe": DELTA_SIZES | SHARED_SIZES,
    "qwen3_next": DELTA_SIZES | SHARED_SIZES | {"tie_word_embeddings": False},
    "phi3": {
        "pad_token_id": 0,
        "original_max_position_embeddings": 256,
        "rope_parameters": {
            "rope_type": "longrope",
            "partial_rotary_factor": 0.5,
            "short_factor": [1.0, 1.5, 2.0, 2.5, 3.0, 3.5, 4.0, 4.5],
            "long_factor": [2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0],
        },
    },
    "smollm3": {
        "pad_token_id": 0,
        "no_rope_layers": [1, 0],
        "use_sliding_window": True,
        "sliding_window": 16,
    },
    "mixtral": {"num_local_experts": 4},
    "qwen2_moe": SHARED_SIZES,
    "qwen3_moe": {
        "head_dim": 64,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 96,
        "norm_topk_prob": True,
    },
    "granite": {
        "attention_bias": True,
        "embedding_multiplier": 6.0,
        "attention_multiplier": 0.1,
        "residual_multiplier": 0.4,
        "logits_scaling": 1.5,
    },
    "seed_oss": {"head_dim": 64, "attention_out_bias": True, "mlp_bias": True},
    "hunyuan_v1_dense": {
        "head_dim": 64,
        "rope_parameters": {
            "rope_type": "dynamic",
            "rope_theta": 10000.0,
            "factor": 1.0,
            "alpha": 50.0,
        },
    },
    "ernie4_5": {"head_dim": 64},
    "glm": {"head_dim": 64, "pad_token_id": 0},
    "glm4": {"head_dim": 64, "pad_token_id": 0},
    "ministral3": {"head_dim": 64, **scaled_queries(8, 64.0)},
    "olmoe": {
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "intermediate_size": 96,
        "tie_word_embeddings": False,
    },
    "glm4_moe": {
        "head_dim": 64,
        "n_routed_experts": 8,
        "num_experts_per_tok": 2,
        "n_group": 2,
        "topk_group": 1,
        "moe_intermediate_size": 96,
        "n_shared_experts": 2,
        "routed_scaling_factor": 1.5,
        "attention_bias": True,
        "use_qk_norm": True,
        "tie_word_embeddings": False,
    },
    "deepseek_v2": LATENT_SIZES | {"q_lora_rank": None, "n_group": 1, "topk_group": 1},
    "deepseek_v3": LATENT_SIZES | {"q_lora_rank": 48, "n_group": 2, "topk_group": 1},
    "gpt_oss": {
        "head_dim": 64,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "sliding_window": 16,
        "tie_word_embeddings": False,
        **yarn(128, 4.0, truncate=False),
    },
    "olmo2": {"hidden_size": 160, "head_dim": 64},
    "olmo3": {
        "hidden_size": 160,
        "head_dim": 64,
        "layer_types": ["sliding_attention", "full_attention"],
        "sliding_window": 16,
    },
    "exaone4": {
        "hidden_size": 160,
        "head_dim": 64,
        "layer_types": ["sliding_attention", "full_attention"],
        "sliding_window": 16,
    },
}
SPECIAL_TOKENS = ["<|begin|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"]


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A token for each byte and a few special ones: encodes any text, needs no training."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(SPECIAL_TOKENS)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|begin|>", eos_token="<|end|>"
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


@torch.no_grad()
def randomize_gemma4(model: PreTrainedModel) -> None:
    """Random factors of layers, where there are any. Nothing divides the logits of attention there,
    so query norms do, as in a trained model."""
    if model.config.get_text_config().model_type == "gemma4_text":
        for layer in model.get_decoder().layers:
            layer.layer_scalar.uniform_(0.5, 1.0)
            layer.self_attn.q_norm.weight.mul_(layer.self_attn.head_dim**-0.5)


def save_tiny_model(directory: Path, family: str) -> Path:
    """A random two-layer model that tensor parallelism can split in two, with embeddings tied and
    grouped heads.

    The intermediate size 192 = 12 * 16 needs a Hadamard base beyond powers of two, whole or halved.
    The weights are larger than those of a fresh training run, so that the next token is seldom a
    close call; norm weights differ from one and biases, where the family has them, from zero.
    """
    tokenizer = byte_tokenizer()
    torch.manual_seed(0)
    sizes = {
        "vocab_size": len(tokenizer),
        "hidden_size": 128,
        "intermediate_size": 192,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "initializer_range": 0.12,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "tie_word_embeddings": True,
    }
    config = FAMILIES[family](**sizes | OWN_SIZES.get(family, {}))
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                # Some multiply by one more than their weight.
                offset = SUPPORTED[config.model_type].norm_offset
                parameter.uniform_(0.5, 1.5).sub_(0.0 if "linear_attn" in name else offset)
            elif name.endswith("bias"):
                parameter.normal_(std=0.3)
        for name, buffer in model.named_buffers():
            if name.endswith("correction_bias"):
                buffer.normal_(std=0.1)
        randomize_gemma4(model)
    model.bfloat16().save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def convert(source: Path, out: Path, *options: str) -> Path:
    """``smoothrot-convert run`` as a user types it, in a process of its own."""
    preset = () if "--preset" in options else ("--preset", "none")
    result = run_forked(COMMAND, "run", source, out, *preset, *options, timeout=900)
    assert result.returncode == 0, result.stderr
    return out
