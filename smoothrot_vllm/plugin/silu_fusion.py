# SPDX-License-Identifier: Apache-2.0
"""Moves ``silu(gate) * up`` of an MLP into the op of its down_proj: one pass over the intermediate
values, one op, fewer.

vLLM has no interface for this that all model classes use. They do all keep an ``SiluAndMul`` beside
a ``down_proj`` that reads it, so both are recognized when they become children of one module, and
the activation is replaced by a module that hands gate and up on. What it hands on is no tensor: any
reader but that down_proj fails, and no other arithmetic can happen to it.
"""

from functools import cache
from typing import cast

import torch
from torch.nn.modules.module import register_module_module_registration_hook
from vllm.config import get_current_vllm_config_or_none
from vllm.model_executor.layers.activation import SiluAndMul
from vllm.model_executor.layers.linear import RowParallelLinear

from smoothrot_vllm.errors import ConfigError
from smoothrot_vllm.plugin.linear import GateUp, SmoothRotLinearMethod

OPTION = "smoothrot_fuse_silu"
"""Key of vLLM's ``--additional-config``: ``false`` leaves the activation to vLLM. It is part of
the compile cache's key."""


class DeferredSiluAndMul(torch.nn.Module):
    """Takes the place of an ``SiluAndMul`` whose only reader computes it."""

    def __init__(self, reader: str) -> None:
        super().__init__()
        self.reader = reader

    def forward(self, gate_up: torch.Tensor) -> GateUp:
        """``(..., 2 K)``, handed on as it is."""
        return GateUp(gate_up, self.reader)


def wanted() -> bool:
    """Whether the current vLLM configuration lets activations be moved.

    LoRA forbids it: vLLM multiplies the input of down_proj, the activation itself, with the
    adapter's weights.

    Raises:
        ConfigError: ``smoothrot_fuse_silu`` in ``--additional-config`` is no boolean.
    """
    config = get_current_vllm_config_or_none()
    if config is None:
        return False
    options = config.additional_config
    option = options.get(OPTION, True) if isinstance(options, dict) else True
    if not isinstance(option, bool):
        raise ConfigError(
            f"--additional-config: {OPTION}: expected true or false, got {option!r}. Leave it out"
            " for true."
        )
    return option and config.lora_config is None


@cache
def install() -> None:
    """From now on move the activations of modules that are built around one of our down_proj,
    and of no others."""
    # torch's annotation leaves out that a hook may return a module.
    register_module_module_registration_hook(_on_registration)  # type: ignore[arg-type]


def _takes_gate_up(module: torch.nn.Module | None) -> bool:
    # A layer that splits its own input does so before our method sees it.
    return (
        isinstance(module, RowParallelLinear)
        and module.input_is_parallel
        and isinstance(module.quant_method, SmoothRotLinearMethod)
    )


def _on_registration(
    parent: torch.nn.Module, name: str, child: torch.nn.Module | None
) -> torch.nn.Module | None:
    """What to register in place of ``child``, None for itself."""
    if type(child) is not SiluAndMul and not _takes_gate_up(child):
        return None
    children: dict[str, torch.nn.Module | None] = {**dict(parent.named_children()), name: child}
    activations = [key for key, module in children.items() if type(module) is SiluAndMul]
    reader = children.get("down_proj")
    if len(activations) != 1 or not _takes_gate_up(reader) or not wanted():
        return None
    method = cast(SmoothRotLinearMethod, cast(RowParallelLinear, reader).quant_method)
    deferred = DeferredSiluAndMul(method.prefix)
    if activations[0] == name:
        return deferred
    setattr(parent, activations[0], deferred)
    return None
