# SPDX-License-Identifier: Apache-2.0
"""Mistral family: Llama's layer without biases, with an optional sliding window."""

from dataclasses import replace

from smoothrot_offline.architectures.llama import LLAMA

MISTRAL = replace(LLAMA, model_type="mistral", class_name="MistralForCausalLM", biases={})
