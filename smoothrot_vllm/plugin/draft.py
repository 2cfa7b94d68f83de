# SPDX-License-Identifier: Apache-2.0
"""The model classes of draft heads that were transformed for a model with R1 folded: vLLM's own,
and a linear behind them, before them too if they read hidden states through a norm."""

from typing import TYPE_CHECKING, cast

import torch
from vllm.model_executor.layers.linear import ReplicatedLinear
from vllm.model_executor.models.llama_eagle import EagleLlamaForCausalLM
from vllm.model_executor.models.utils import maybe_prefix

from smoothrot_vllm.errors import ConfigError
from smoothrot_vllm.format import ADAPTER_BASE, DRAFT_INPUT, DRAFT_OUTPUT
from smoothrot_vllm.plugin.engine_checks import OWN_HEAD
from smoothrot_vllm.plugin.quant_config import SmoothRotConfig

if TYPE_CHECKING:
    from vllm.config import ModelConfig, VllmConfig
    from vllm.sequence import IntermediateTensors


_TRANSFORMED = "SmoothRot"
"""Put before the name of vLLM's class."""


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
        _add_linear(self.model, DRAFT_OUTPUT, vllm_config, maybe_prefix(prefix, "model"))

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


class TransformedOwnHead:
    """The part that a converted model's own head has beside vLLM's class for it, which
    :func:`use_transformed_class` puts behind this one.

    Args:
        vllm_config: of the engine.
        prefix: of the head's modules.
    """

    model: torch.nn.Module

    def __init__(self, *, vllm_config: "VllmConfig", prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)  # type: ignore[call-arg]
        for name in (DRAFT_INPUT, DRAFT_OUTPUT):
            _add_linear(self.model, name, vllm_config, maybe_prefix(prefix, OWN_HEAD.rstrip(".")))

    # Named and ordered as vLLM's, whose compiler goes by the names.
    def forward(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        hidden_states: torch.Tensor,
        intermediate_tensors: "IntermediateTensors | None" = None,
        inputs_embeds: torch.Tensor | None = None,
        **kwargs: object,
    ) -> torch.Tensor:
        """What the output head reads and the next step is given, from the same of the step before
        or what the model's final norm gives out, all ``(tokens, hidden)``."""
        hidden_states = self.model.get_submodule(DRAFT_INPUT)(hidden_states)
        found = super().forward(  # type: ignore[misc]
            input_ids, positions, hidden_states, intermediate_tensors, inputs_embeds, **kwargs
        )
        transformed: torch.Tensor = self.model.get_submodule(DRAFT_OUTPUT)(found)
        return transformed


def use_transformed_class(draft: "ModelConfig") -> None:
    """Have vLLM make a converted model's own head with the linears that it has got.

    vLLM derives the name of its class from the model's, and takes it from ``draft``, the
    configuration of the head.
    """
    from vllm.model_executor.models import ModelRegistry

    # It is transformed already where a worker is made once more.
    original = cast(list[str], draft.hf_config.architectures)[0].removeprefix(_TRANSFORMED)
    transformed = _TRANSFORMED + original
    if transformed not in ModelRegistry.models:
        base, _ = ModelRegistry.resolve_model_cls([original], draft)
        ModelRegistry.register_model(transformed, type(transformed, (TransformedOwnHead, base), {}))
    draft.hf_config.architectures = [transformed]


def _add_linear(head: torch.nn.Module, name: str, config: "VllmConfig", prefix: str) -> None:
    """Add a linear of hidden size by hidden size to a head, where its loader looks for all its
    tensors."""
    size = config.model_config.get_hidden_size()
    linear = ReplicatedLinear(
        size,
        size,
        bias=False,
        params_dtype=cast(torch.dtype, config.model_config.dtype),
        prefix=f"{prefix}.{name}",
        return_bias=False,
    )
    head.add_module(name, linear)


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
