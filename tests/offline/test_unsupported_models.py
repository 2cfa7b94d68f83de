# SPDX-License-Identifier: Apache-2.0
"""What is not supported is refused by name: architectures, and settings of those that are."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from refusal import edit_config, refusal

from smoothrot_vllm.errors import (
    UnsupportedModelError,
)

MakeModel = Callable[..., Path]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"model_type": "llava", "architectures": ["LlavaForConditionalGeneration"]},
            "LlavaForConditional.*not supported",
        ),
        (
            {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]},
            "GPT2LMHeadModel .*not supported",
        ),
        ({"model_type": None}, "not supported"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "expected LlamaForCausalLM"),
        (
            {
                "model_type": "phimoe",
                "architectures": ["PhimoeForCausalLM"],
                "num_local_experts": 8,
            },
            "mixture of experts",
        ),
        (
            {"model_type": "gemma3n_text", "architectures": ["Gemma3nForCausalLM"]},
            "Gemma3nForCausalLM .model_type 'gemma3n_text'. is not supported",
        ),
        ({"hidden_act": "gelu"}, "hidden_act: expected one of silu.*gelu"),
        ({"auto_map": {"AutoModelForCausalLM": "modeling_x.X"}}, "own Python code"),
        ({"quantization_config": {"quant_method": "hqq"}}, "already quantized.*hqq"),
        ({"quantization_config": {"quant_method": "smoothrot"}}, "already quantized.*smoothrot"),
        ({"layer_types": ["sliding_attention", "full_attention", "full_attention"]}, "layer_types"),
        ({"hidden_size": "wide"}, "transformers refuses"),
        ({"num_attention_heads": 7}, "transformers refuses"),
        ({"rope_parameters": {"rope_type": "spiral"}}, "rope_type: expected one of .*spiral"),
        ({"num_key_value_heads": 2}, "9 attention heads to be a multiple of 2"),
        ({"num_key_value_heads": 0}, "num_key_value_heads: expected a whole number from 1"),
        ({"head_dim": -8}, "head_dim: expected a whole number from 1"),
        (
            {"vocab_size": 2**40},
            "vocab_size: expected a whole number from 1 to 2147483647, got 1099511627776",
        ),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers: expected 0 to 65536"),
        ({"num_labels": 10**9}, "num_labels: expected 0 to 65536"),
    ],
)
def test_unsupported_architectures_are_named(
    make_model: MakeModel, changes: dict[str, Any], words: str
) -> None:
    assert_unsupported(make_model(), changes, words)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"hidden_activation": "silu"},
            "hidden_activation: expected one of gelu_pytorch_tanh.*silu",
        ),
        ({"attn_logit_softcapping": 50.0}, "attn_logit_softcapping: expected one of None.*50"),
        (
            {"use_bidirectional_attention": True},
            "use_bidirectional_attention: expected one of None, False.*True",
        ),
        (
            {"rope_parameters": {"full_attention": {"rope_type": "spiral"}}},
            "rope_type: expected one of .*spiral",
        ),
        (
            {"layer_types": ["sliding_attention", "full_attention", "no_attention"]},
            "transformers refuses",
        ),
    ],
)
def test_settings_that_gemma_3_is_not_served_with_are_named(
    make_model: MakeModel, changes: dict[str, Any], words: str
) -> None:
    assert_unsupported(make_model("gemma3"), changes, words)


GEMMA4_SLIDING = {"rope_type": "default", "rope_theta": 1e4}
GEMMA4_FULL = {"rope_type": "proportional", "rope_theta": 1e6}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_experts": 4}, r"mixture of experts \(num_experts = 4\): of those, only"),
        ({"enable_moe_block": True}, "enable_moe_block: expected one of False.*True"),
        (
            {"use_double_wide_mlp": True},
            "use_double_wide_mlp: expected False: the format knows one width.*True",
        ),
        (
            {"num_kv_shared_layers": 4},
            "num_kv_shared_layers: expected a layer of full_attention before the last 4",
        ),
        (
            {"vocab_size_per_layer_input": 95},
            "vocab_size_per_layer_input: expected at least vocab_size, 96.*95",
        ),
        (
            {"per_layer_config": {"1": {"intermediate_size": 76}}},
            "per_layer_config: intermediate_size: expected head_dim and num_key_value_heads alone",
        ),
        (
            {"per_layer_config": {"1": {"head_dim": 0}}},
            "head_dim: expected a whole number from 1 to 2147483647, got 0",
        ),
        (
            {"hidden_size_per_layer_input": -10},
            "hidden_size_per_layer_input: expected a whole number from 1",
        ),
        (
            {"per_layer_config": {"1": {"head_dim": 20}}},
            "per_layer_config: expected the same heads in all layers of full_attention, got 12 wide"
            " with 3 for keys, 20 wide with 3 for keys",
        ),
        (
            {"rope_parameters": GEMMA4_SLIDING},
            "rope_parameters: expected those of full_attention by that name",
        ),
        (
            {
                "rope_parameters": {
                    "sliding_attention": GEMMA4_SLIDING,
                    "full_attention": GEMMA4_FULL | {"factor": 8.0},
                }
            },
            "rope_parameters: factor: expected 1.0 .*got 8.0",
        ),
        (
            {
                "rope_parameters": {
                    "sliding_attention": GEMMA4_SLIDING | {"partial_rotary_factor": 0.5},
                    "full_attention": GEMMA4_FULL,
                }
            },
            "rope_parameters: partial_rotary_factor: expected 1.0 .*got 0.5",
        ),
    ],
)
def test_settings_that_gemma_4_is_not_served_with_are_named(
    make_model: MakeModel, changes: dict[str, Any], words: str
) -> None:
    assert_unsupported(make_model("gemma4"), changes, words)


@pytest.mark.parametrize(
    ("family", "changes", "words"),
    [
        (
            "qwen3",
            {"attention_bias": True},
            "attention_bias: expected one of False.*Qwen3ForCausalLM.*True",
        ),
        ("qwen3", {"use_sliding_window": True}, "use_sliding_window: expected one of False.*True"),
        ("qwen2_moe", {"qkv_bias": False}, "qkv_bias: expected one of True.*False"),
        ("qwen2_moe", {"use_sliding_window": True}, "use_sliding_window: expected one of False"),
        ("qwen2_moe", {"mlp_only_layers": [1]}, r"mlp_only_layers: expected \[\].*got \[1\]"),
        (
            "qwen2_moe",
            {"shared_expert_intermediate_size": 0},
            "shared_expert_intermediate_size: expected a whole number from 1 to .*got 0",
        ),
        ("phi3", {"hidden_act": "gelu"}, "hidden_act: expected one of silu.*gelu"),
        (
            "qwen3_5",
            {"layer_types": ["linear_attention", "full_attention", "sliding_attention"]},
            "layer_types: expected one of full_attention, linear_attention for each layer of"
            " Qwen3_5ForCausalLM, got 'sliding_attention' for layer 2",
        ),
        (
            "qwen3_5",
            {"linear_num_value_heads": 5},
            "linear_num_value_heads, 5, to be a multiple of linear_num_key_heads, 2",
        ),
        (
            "qwen3_5",
            {"linear_conv_kernel_dim": 0},
            "linear_conv_kernel_dim: expected a whole number from 1",
        ),
        ("qwen3_5", {"attn_output_gate": False}, "attn_output_gate: expected one of True.*False"),
        (
            "phi3",
            {"rope_parameters": {"rope_type": "linear", "factor": 2.0}},
            "transformers refuses",
        ),
        (
            "phi3",
            {"auto_map": {"AutoModelForCausalLM": "modeling_x.X"}},
            "own Python code.*modeling_x.X",
        ),
        ("phi3", {"layer_types": ["full_attention"] * 3}, "layer_types"),
        (
            "phi3",
            {"hidden_size": 2**53, "partial_rotary_factor": ["x"]},
            "partial_rotary_factor: expected a number",
        ),
        ("smollm3", {"hidden_act": "gelu"}, "hidden_act: expected one of silu.*gelu"),
        *(
            (family, {"hidden_act": "gelu"}, "hidden_act: expected one of silu.*gelu")
            for family in (
                "granite",
                "seed_oss",
                "hunyuan_v1_dense",
                "ernie4_5",
                "glm",
                "glm4",
                "ministral3",
                "olmo2",
                "olmo3",
                "exaone4",
                "olmoe",
            )
        ),
        (
            "ministral3",
            {"llama_4_scaling": {"beta": 0.1, "original_max_position_embeddings": 8}},
            "llama_4_scaling: expected none, or .*beta.*0.5.* as in rope_parameters.*got.*0.1",
        ),
        (
            "exaone4",
            {"sliding_window": None},
            "sliding_window and layer_types: expected a window and layers of sliding_attention",
        ),
        (
            "gemma2",
            {"hidden_activation": "silu"},
            "hidden_activation: expected one of gelu_pytorch_tanh.*silu",
        ),
        (
            "gemma2",
            {"tie_word_embeddings": False},
            "tie_word_embeddings: expected one of True.*False",
        ),
        (
            "gemma2",
            {"use_bidirectional_attention": True},
            "use_bidirectional_attention: expected one of None, False.*True",
        ),
    ],
)
def test_settings_that_a_family_is_not_served_with_are_named(
    make_model: MakeModel, family: str, changes: dict[str, Any], words: str
) -> None:
    assert_unsupported(make_model(family), changes, words)


def assert_unsupported(source: Path, changes: dict[str, Any], words: str) -> None:
    edit_config(source, **changes)
    error = refusal(source)
    assert isinstance(error, UnsupportedModelError)
    assert re.search(words, str(error)), str(error)
