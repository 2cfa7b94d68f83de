# SPDX-License-Identifier: Apache-2.0
"""The model class of EAGLE heads that ``smoothrot-convert draft`` transformed: vLLM's own, and one
linear behind it."""

from typing import TYPE_CHECKING, cast

import torch
from vllm.model_executor.layers.linear import ReplicatedLinear
from vllm.model_executor.models.llama_eagle import EagleLlamaForCausalLM
from vllm.model_executor.models.utils import maybe_prefix

from smoothrot_vllm.errors import ConfigError
from smoothrot_vllm.format import ADAPTER_BASE, DRAFT_OUTPUT
from smoothrot_vllm.plugin.quant_config import SmoothRotConfig

if TYPE_CHECKING:
    from vllm.config import VllmConfig


class TransformedEagleHead(EagleLlamaForCausalLM):
    """An EAGLE head whose hidden states are taken to those of a model with R1 folded, for that
    model's output head and for the head's own next step.

    Args:
        vllm_config: of the engine; the head's own configuration is in its ``speculative_config``.
        prefix: of the head's modules.

    Raises:
        ConfigError: the engine's model is not the one that the head was transformed for.
    """

    def __init__(self, *, vllm_config: "VllmConfig", prefix: str = "") -> None:
        _check_base(vllm_config)
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        size = self.config.hidden_size
        linear = ReplicatedLinear(
            size,
            size,
            bias=False,
            params_dtype=cast(torch.dtype, vllm_config.model_config.dtype),
            prefix=maybe_prefix(prefix, f"model.{DRAFT_OUTPUT}"),
            return_bias=False,
        )
        # Where the loader of EagleLlamaForCausalLM looks for all tensors of a head.
        self.model.add_module(DRAFT_OUTPUT, linear)

    def forward(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        hidden_states: torch.Tensor,
        inputs_embeds: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What the output head reads and what the next step is given, both ``(tokens, hidden)`` and
        the same."""
        found, _ = super().forward(input_ids, positions, hidden_states, inputs_embeds)
        found = self.model.get_submodule(DRAFT_OUTPUT)(found)
        return found, found


def _check_base(vllm_config: "VllmConfig") -> None:
    speculative, base = vllm_config.speculative_config, vllm_config.quant_config
    if speculative is None:
        raise ConfigError(
            "a transformed draft head drafts for a converted model, and is none itself: name it in"
            " --speculative-config."
        )
    head = speculative.draft_model_config
    expected = base.stored.transform_sha256 if isinstance(base, SmoothRotConfig) else None
    found = getattr(head.hf_config, ADAPTER_BASE, None)
    if found is None or found != expected:
        raise ConfigError(
            f"draft head {head.model} was transformed for another model: expected {ADAPTER_BASE}"
            f" {expected or 'of a converted model'} in config.json, got {found}. Run"
            " `smoothrot-convert draft HEAD OUT --base DIR` on the original head with the served"
            " directory as DIR, or serve the original head with the original model."
        )
