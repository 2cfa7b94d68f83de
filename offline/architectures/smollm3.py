# SPDX-License-Identifier: Apache-2.0
"""SmolLM3: Llama's layer, every fourth of them without rotary embedding."""

from dataclasses import replace

from smoothrot_offline.architectures.llama import LLAMA

# vLLM serves it with transformers' own class: both read the same keys.
SMOLLM3 = replace(
    LLAMA,
    model_type="smollm3",
    class_name="SmolLM3ForCausalLM",
    layer_types=True,
    settings={"hidden_act": ("silu",)},
    same={},
)
