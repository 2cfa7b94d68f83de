# SPDX-License-Identifier: Apache-2.0
"""Has vLLM's class of gpt-oss load experts that are stored one by one.

Other classes with experts leave the names of their tensors to vLLM's own code for experts; this one
has a loader for the fused tensors of its own checkpoints and passes over what it does not know.
"""

import re
import sys
from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from vllm.model_executor.layers.fused_moe import RoutedExperts

NAMES = {"w1": "w1", "w2": "w2", "w3": "w3"}
"""What the checkpoint calls gate, down and up, by vLLM's shard id. The class renames what ends in
``down_proj.bias``."""
_MODULE = "vllm.model_executor.models.gpt_oss"
_STORED = re.compile(r"(.*\.mlp\.experts\.)(\d+)\.(w[123])\.(\w+)")


def has_experts(layer: "RoutedExperts") -> bool:
    """Whether a layer's experts are those of vLLM's class of gpt-oss."""
    return type(layer).__module__ == _MODULE


@cache
def load_separate_experts() -> None:
    """``GptOssModel._try_load_streamed_expert`` takes the tensors of single experts to the loaders
    of our parameters; all others meet vLLM's own.

    Why: ``GptOssModel.load_weights`` knows tensors by its own names alone, and asks the
    quantization method about none.

    Until: a vLLM whose class loads them as other classes with experts do.
    """
    model: Any = sys.modules[_MODULE].GptOssModel
    model._try_load_streamed_expert = classmethod(_taking(model._try_load_streamed_expert.__func__))


def _taking(load: Callable[..., bool]) -> Callable[..., bool]:
    def take(
        cls: type,
        name: str,
        loaded_weight: "torch.Tensor",
        params_dict: "dict[str, torch.nn.Parameter]",
        loaded_params: set[str],
    ) -> bool:
        match = _STORED.fullmatch(name)
        if match is not None:
            layer, expert, shard, suffix = match.groups()
            stack = "w2" if shard == "w2" else "w13"
            ours = f"{layer}routed_experts.{stack}_{suffix}"
            if ours in params_dict:
                parameter: Any = params_dict[ours]
                parameter.weight_loader(parameter, loaded_weight, ours, shard, int(expert))
                loaded_params.add(ours)
                return True
        return load(cls, name, loaded_weight, params_dict, loaded_params)

    return take
