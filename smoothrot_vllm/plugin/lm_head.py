# SPDX-License-Identifier: Apache-2.0
"""The quantized output head: a linear over vocabulary shards that vLLM pads to a multiple of 64
rows."""

from typing import Any, cast

import torch
from vllm.config import get_current_vllm_config_or_none
from vllm.model_executor.layers.linear import register_weight_loader_v2_supported_method
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

from smoothrot_vllm.errors import ConfigError
from smoothrot_vllm.format import WEIGHT_SCALE, LinearScheme
from smoothrot_vllm.plugin.linear import SmoothRotLinearMethod


@register_weight_loader_v2_supported_method
class SmoothRotLMHeadMethod(SmoothRotLinearMethod):
    """``logits = linear(hidden)`` with stored codes; rows that pad the vocabulary have zero codes
    and scales.

    vLLM's loader for vocabulary shards zeroes the padding and cuts its logits off.
    """

    def __init__(self, prefix: str, scheme: LinearScheme) -> None:
        super().__init__(prefix, scheme, rotation=None, parts=[prefix.rpartition(".")[2]])

    def create_weights(
        self, layer: torch.nn.Module, *sizes: Any, **extra_weight_attrs: Any
    ) -> None:
        """As for any linear."""
        super().create_weights(layer, *sizes, **extra_weight_attrs)
        config = get_current_vllm_config_or_none()
        self.is_read = (
            config is None
            or config.model_config is None
            or config.model_config.runner_type != "pooling"
        )

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        """As for any linear; and an empty ``weight``, which vLLM's LoRA asks for its dtype and
        device.

        Nothing at all in a model that is served for pooling: vLLM drops the head's tensors and
        never calls it.
        """
        if not self.is_read:
            return
        super().process_weights_after_loading(layer)
        device = layer.get_parameter(WEIGHT_SCALE).device
        layer.weight = torch.empty(0, dtype=cast(torch.dtype, layer.params_dtype), device=device)

    def stored_rows(self, layer: torch.nn.Module) -> int:
        """The rows before the padding."""
        return cast(ParallelLMHead, layer).num_org_embeddings_per_partition

    def tie_weights(self, layer: torch.nn.Module, embed_tokens: torch.nn.Module) -> torch.nn.Module:
        """Refuse to share the 16-bit embedding with a quantized head.

        Raises:
            ConfigError: always.
        """
        raise ConfigError(
            f"{self.prefix}: expected an untied output head, got one tied to the embedding, which"
            " stays 16-bit. Convert the model again with smoothrot-convert, which unties them."
        )
