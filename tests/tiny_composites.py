# SPDX-License-Identifier: Apache-2.0
"""Small random vision-language models made on the fly, with what prepares their images."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tiny_models import OWN_SIZES, byte_tokenizer, randomize_gemma4, scaled_queries
from transformers import (
    AutoModelForImageTextToText,
    Gemma3Config,
    Gemma4Config,
    Idefics3Config,
    Mistral3Config,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen3_5Config,
    Qwen3_5MoeConfig,
    Qwen3VLConfig,
    SmolVLMConfig,
)

from smoothrot_offline.source.composites import COMPOSITES

CONFIGURATIONS: dict[str, Callable[..., PreTrainedConfig]] = {
    "gemma3": Gemma3Config,
    "gemma4": Gemma4Config,
    "gemma4, large": Gemma4Config,
    "qwen2_5_vl": Qwen2_5_VLConfig,
    "qwen3_vl": Qwen3VLConfig,
    "qwen3_5": Qwen3_5Config,
    "qwen3_5_moe": Qwen3_5MoeConfig,
    "mistral3": Mistral3Config,
    "mistral3, ministral3": Mistral3Config,
    "idefics3": Idefics3Config,
    "smolvlm": SmolVLMConfig,
}
SIDE, PATCH = 32, 8
ENCODER: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": SIDE,
    "patch_size": PATCH,
}
QWEN_ENCODER: dict[str, Any] = {
    "depth": 3,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_heads": 2,
    "patch_size": PATCH,
    "out_hidden_size": 128,
}
QWEN_TOKENS = {
    "image_token_id": "<|image_pad|>",
    "video_token_id": "<|video_pad|>",
    "vision_start_token_id": "<|vision_start|>",
    "vision_end_token_id": "<|vision_end|>",
}
IMAGE_TOKENS: dict[str, dict[str, str]] = {
    "gemma3": {
        "image_token_index": "<image_soft_token>",
        "boi_token_index": "<start_of_image>",
        "eoi_token_index": "<end_of_image>",
    },
    "gemma4": {
        "image_token_id": "<|image|>",
        "boi_token_id": "<|image>",
        "eoi_token_id": "<image|>",
        "audio_token_id": "<|audio|>",
        "boa_token_id": "<|audio>",
        "eoa_token_index": "<audio|>",
        "video_token_id": "<|video|>",
    },
    "qwen2_5_vl": QWEN_TOKENS,
    "qwen3_vl": QWEN_TOKENS,
    "qwen3_5": QWEN_TOKENS,
    "qwen3_5_moe": QWEN_TOKENS,
    "mistral3": {"image_token_index": "[IMG]"},
    "idefics3": {"image_token_id": "<image>"},
    "smolvlm": {"image_token_id": "<image>"},
}
"""Keys of the configuration around the text tower, and the tokens whose ids they hold."""
MORE_TOKENS: dict[str, list[str]] = {
    # vLLM looks them up.
    "gemma3": ["\n", "\n\n", "\n\n\n", "\n\n\n\n"],
    "mistral3": ["[IMG_BREAK]", "[IMG_END]"],
    "idefics3": ["<fake_token_around_image>", "<global-img>", "<end_of_utterance>"],
    "smolvlm": ["<fake_token_around_image>", "<global-img>", "<end_of_utterance>"],
}
TEXT: dict[str, dict[str, Any]] = {
    "gemma3": {
        "head_dim": 64,
        "layer_types": ["sliding_attention", "full_attention"],
        "sliding_window": 16,
        "query_pre_attn_scalar": 100,
    },
    # With what layers are given beside the residual stream, and without.
    "gemma4": OWN_SIZES["gemma4"] | {"pad_token_id": 0},
    "gemma4, large": OWN_SIZES["gemma4_large"]
    | {"pad_token_id": 0, "use_bidirectional_attention": "vision"},
    "qwen2_5_vl": {
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 1e4,
            "mrope_section": [4, 6, 6],
        }
    },
    "qwen3_vl": {
        "head_dim": 32,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 1e4,
            "mrope_section": [6, 5, 5],
            "mrope_interleaved": True,
        },
    },
    "qwen3_5": OWN_SIZES["qwen3_5"],
    # Every token goes through all experts: no rounding error sends one elsewhere.
    "qwen3_5_moe": OWN_SIZES["qwen3_5_moe"] | {"num_experts_per_tok": 8},
    "mistral3": {"model_type": "mistral", "head_dim": 32},
    "mistral3, ministral3": {"model_type": "ministral3", "head_dim": 32, **scaled_queries(8, 64.0)},
    "idefics3": {"model_type": "llama"},
    "smolvlm": {"model_type": "llama"},
}
# The fewest tokens of an image that Gemma's processors take.
_GEMMA4_IMAGES = {"patch_size": PATCH, "pooling_kernel_size": 2, "max_soft_tokens": 70}
VISION: dict[str, dict[str, Any]] = {
    "gemma3": ENCODER | {"vision_use_head": False},
    "gemma4": ENCODER
    | {
        "num_key_value_heads": 2,
        "head_dim": 32,
        "pooling_kernel_size": 2,
        "position_embedding_size": 64,
        "use_clipped_linears": True,
        "standardize": True,
        # vLLM reads it, transformers' processor has its own.
        "default_output_length": _GEMMA4_IMAGES["max_soft_tokens"],
    },
    "qwen2_5_vl": QWEN_ENCODER | {"window_size": 32, "fullatt_block_indexes": [1]},
    "qwen3_vl": QWEN_ENCODER | {"num_position_embeddings": 16, "deepstack_visual_indexes": [0, 1]},
    "qwen3_5": QWEN_ENCODER | {"num_position_embeddings": 16},
    "qwen3_5_moe": QWEN_ENCODER | {"num_position_embeddings": 16},
    "mistral3": ENCODER | {"model_type": "pixtral", "head_dim": 32},
    "idefics3": ENCODER,
    "smolvlm": ENCODER,
}
AUDIO: dict[str, Any] = {
    "hidden_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "subsampling_conv_channels": [16, 8],
    "output_proj_dims": 48,
}
OUTER: dict[str, dict[str, Any]] = {
    "gemma3": {"mm_tokens_per_image": 4},
    "mistral3": {"spatial_merge_size": 2},
    "idefics3": {"scale_factor": 2, "pad_token_id": 0},
    "smolvlm": {"scale_factor": 2, "pad_token_id": 0},
}
HEARS = ("gemma4",)
"""Families whose small model has a tower for sound."""
_QWEN_IMAGES = {
    "patch_size": PATCH,
    "temporal_patch_size": 2,
    "merge_size": 2,
    "size": {"shortest_edge": SIDE * SIDE, "longest_edge": SIDE * SIDE},
}
_IDEFICS_IMAGES = {
    "size": {"longest_edge": SIDE},
    "max_image_size": {"longest_edge": SIDE},
    "do_image_splitting": False,
}
# vLLM takes keys that are not there for no normalization, transformers for its default.
NORMALIZED: dict[str, Any] = {
    "do_normalize": True,
    "do_rescale": True,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.25, 0.25, 0.25],
}
PROCESSORS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "gemma3": (
        {
            "image_processor_type": "Gemma3ImageProcessor",
            "size": {"height": SIDE, "width": SIDE},
        },
        {"processor_class": "Gemma3Processor", "image_seq_length": 4},
    ),
    "gemma4": (
        {"image_processor_type": "Gemma4ImageProcessor", "do_normalize": False} | _GEMMA4_IMAGES,
        {
            "processor_class": "Gemma4Processor",
            "image_seq_length": 70,
            "feature_extractor": {"feature_extractor_type": "Gemma4AudioFeatureExtractor"},
            "video_processor": {"video_processor_type": "Gemma4VideoProcessor"} | _GEMMA4_IMAGES,
        },
    ),
    "qwen2_5_vl": (
        {"image_processor_type": "Qwen2VLImageProcessor"} | _QWEN_IMAGES,
        {"processor_class": "Qwen2_5_VLProcessor"},
    ),
    "qwen3_vl": (
        {"image_processor_type": "Qwen2VLImageProcessor"} | _QWEN_IMAGES,
        {"processor_class": "Qwen3VLProcessor"},
    ),
    "qwen3_5_moe": (
        {"image_processor_type": "Qwen2VLImageProcessor"} | _QWEN_IMAGES,
        {"processor_class": "Qwen3VLProcessor"},
    ),
    "qwen3_5": (
        {"image_processor_type": "Qwen2VLImageProcessor"} | _QWEN_IMAGES,
        {"processor_class": "Qwen3VLProcessor"},
    ),
    "mistral3": (
        {
            "image_processor_type": "PixtralImageProcessor",
            "patch_size": {"height": PATCH, "width": PATCH},
            "size": {"longest_edge": SIDE},
        },
        {"processor_class": "PixtralProcessor", "patch_size": PATCH, "spatial_merge_size": 2},
    ),
    "idefics3": (
        {"image_processor_type": "Idefics3ImageProcessor"} | _IDEFICS_IMAGES,
        {"processor_class": "Idefics3Processor", "image_seq_len": 4},
    ),
    "smolvlm": (
        {"image_processor_type": "SmolVLMImageProcessor"} | _IDEFICS_IMAGES,
        {"processor_class": "SmolVLMProcessor", "image_seq_len": 4},
    ),
}
"""What ``preprocessor_config.json`` and ``processor_config.json`` hold."""


def model_type(family: str) -> str:
    """That of the model around the text tower; some have several kinds of it."""
    return family.partition(",")[0]


def tokenizer_for(family: str) -> PreTrainedTokenizerFast:
    """The tiny models' tokenizer with the tokens that stand for images."""
    tokenizer = byte_tokenizer()
    named = IMAGE_TOKENS[model_type(family)]
    tokenizer.add_tokens(
        [*named.values(), *MORE_TOKENS.get(model_type(family), [])], special_tokens=True
    )
    if model_type(family) == "gemma4":
        # Its processor pads.
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(0)
    return tokenizer


def composite_config(family: str) -> PreTrainedConfig:
    """The configuration of a small model."""
    tokenizer = tokenizer_for(family)
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
        "pad_token_id": None,
        # vLLM asks the text tower's configuration, transformers the one around it.
        "tie_word_embeddings": True,
    }
    tokens = {
        key: tokenizer.convert_tokens_to_ids(token)
        for key, token in IMAGE_TOKENS[model_type(family)].items()
    }
    return CONFIGURATIONS[family](
        text_config=sizes | TEXT[family],
        vision_config=VISION[model_type(family)],
        tie_word_embeddings=True,
        **({"audio_config": AUDIO} if family in HEARS else {}),
        **tokens,
        **OUTER.get(model_type(family), {}),
    )


def random_composite(family: str) -> PreTrainedModel:
    """A random bfloat16 model, whose images matter as much as its text."""
    torch.manual_seed(0)
    offset = COMPOSITES[model_type(family)].text[0].norm_offset
    model: PreTrainedModel = AutoModelForImageTextToText.from_config(composite_config(family))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "language_model" in name or "text_model" in name:
                if "norm" in name:
                    parameter.uniform_(0.5, 1.5).sub_(offset)
                elif name.endswith("bias"):
                    parameter.normal_(std=0.3)
            elif parameter.dim() > 1:
                parameter.normal_(std=parameter[0].numel() ** -0.5)
            elif name.endswith("bias"):
                parameter.normal_(std=0.3)
            else:
                parameter.uniform_(0.5, 1.5)
        for name, buffer in model.named_buffers():
            if name.endswith(("_min", "_max")):
                buffer.fill_(2.0 if name.endswith("_max") else -2.0)
            elif name.endswith(("std_bias", "std_scale")):
                buffer.uniform_(0.5, 1.5)
        randomize_gemma4(model)
    return model.bfloat16()


def save_tiny_composite(directory: Path, family: str) -> Path:
    """A random model of two layers, with its tokenizer and processors."""
    random_composite(family).save_pretrained(directory)
    tokenizer_for(family).save_pretrained(directory)
    path = directory / "tokenizer_config.json"
    # Under these names Gemma's processor asks for them.
    tokens = {
        key.removesuffix("_index").removesuffix("_id"): token
        for key, token in IMAGE_TOKENS[model_type(family)].items()
    }
    path.write_text(json.dumps(json.loads(path.read_text()) | {"extra_special_tokens": tokens}))
    images, processor = PROCESSORS[model_type(family)]
    named = {"processor_class": processor["processor_class"]}
    (directory / "preprocessor_config.json").write_text(json.dumps(NORMALIZED | images | named))
    (directory / "processor_config.json").write_text(json.dumps(processor))
    return directory
