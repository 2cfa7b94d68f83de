# SPDX-License-Identifier: Apache-2.0
"""Mistral family: Llama's layer without biases, with an optional sliding window."""

from dataclasses import replace

from smoothrot_offline.architectures.llama import LLAMA

# What vLLM's class reads for the biases of a Llama, which transformers' classes of these families
# never have.
WITHOUT_BIASES = {
    **{key: values for key, values in LLAMA.settings.items() if key != "sliding_window"},
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
}

MISTRAL = replace(
    LLAMA,
    model_type="mistral",
    class_name="MistralForCausalLM",
    biases={},
    settings=WITHOUT_BIASES | {"llama_4_scaling": (None,), "ada_rms_norm_t_cond": (False, None)},
)
