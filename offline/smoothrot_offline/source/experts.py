# SPDX-License-Identifier: Apache-2.0
"""A mixture of experts as modules: a linear for each weight, under the names of the family's
table."""

from collections.abc import Iterable

import torch
from torch import nn
from transformers import PreTrainedConfig

from smoothrot_offline.source.architecture import Architecture
from smoothrot_vllm.reference import SWIGLU_ALPHA, SWIGLU_LIMIT


def _silu_mul(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    return nn.functional.silu(gate) * up


def _swigluoai(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    gate = gate.clamp(max=SWIGLU_LIMIT)
    return (up.clamp(-SWIGLU_LIMIT, SWIGLU_LIMIT) + 1) * (gate * (SWIGLU_ALPHA * gate).sigmoid())


_ACTIVATIONS = {"silu": _silu_mul, "swigluoai": _swigluoai}
"""What makes one of gate and up, in their dtype."""


class Expert(nn.Module):
    """``down(act(gate(x), up(x)))``, each linear a submodule under the last part of its name in the
    family's table."""

    def __init__(self, table: Architecture, hidden: int, intermediate: int) -> None:
        super().__init__()
        assert table.experts is not None
        self._activation = _ACTIVATIONS[table.experts.activation]
        names = (table.experts.gate, table.up, table.down)
        self._gate, self._up, self._down = map(_leaf, names)
        bias = table.experts.biased
        self.add_module(self._gate, nn.Linear(hidden, intermediate, bias))
        self.add_module(self._up, nn.Linear(hidden, intermediate, bias))
        self.add_module(self._down, nn.Linear(intermediate, hidden, bias))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``(tokens, hidden)`` to the same."""
        gate, up, down = (self.get_submodule(name) for name in (self._gate, self._up, self._down))
        y: torch.Tensor = down(self._activation(gate(x), up(x)))
        return y


class SparseMoe(nn.Module):
    """The router, and the weighted sum of the ``top_k`` experts that it chooses for a token; beside
    them the shared expert, times the sigmoid of its gate.

    Args:
        table: a family with experts.
        config: of the model.
    """

    def __init__(self, table: Architecture, config: PreTrainedConfig) -> None:
        super().__init__()
        names = table.experts
        assert names is not None
        count, intermediate = getattr(config, names.count), getattr(config, names.intermediate)
        self.top_k = config.num_experts_per_tok
        self.normalizes = not names.normalizes or getattr(config, names.normalizes)
        self._gives_scores = names.gives_scores
        self.router_name = _leaf(names.router)
        self.add_module(self.router_name, nn.Linear(config.hidden_size, count, names.biased))
        self.experts = nn.ModuleList(
            Expert(table, config.hidden_size, intermediate) for _ in range(count)
        )
        self._shared = ("", "")
        if (shared := names.shared) is not None:
            width = getattr(config, shared.intermediate)
            self._shared = own, gate = _leaf(shared.module), _leaf(shared.gate)
            self.add_module(own, Expert(table, config.hidden_size, width))
            self.add_module(gate, nn.Linear(config.hidden_size, 1, bias=False))

    def forward(self, x: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, None]:
        """``(..., hidden)`` to the same, or to a pair that begins with it where transformers' layer
        reads one; weighed and summed in float32, or in float64 for such inputs."""
        tokens = x.flatten(0, -2)
        wide = torch.promote_types(x.dtype, torch.float32)
        total = self._of_all(tokens).to(wide)
        logits = self.get_submodule(self.router_name)(tokens)
        weights, chosen = logits.softmax(dim=-1, dtype=wide).topk(self.top_k, dim=-1)
        if self.normalizes:
            weights = weights / weights.sum(dim=-1, keepdim=True)
        for number, expert in enumerate(self.experts):
            token, place = (chosen == number).nonzero(as_tuple=True)
            if token.numel():
                total.index_add_(0, token, expert(tokens[token]) * weights[token, place, None])
        given = total.to(x.dtype).view(x.shape)
        return (given, None) if self._gives_scores else given

    def _of_all(self, tokens: torch.Tensor) -> torch.Tensor:
        """What the shared expert makes of ``(tokens, hidden)``, zeros without one."""
        if not any(self._shared):
            return torch.zeros_like(tokens)
        expert, gate = map(self.get_submodule, self._shared)
        found: torch.Tensor = expert(tokens) * gate(tokens).sigmoid()
        return found


def _leaf(name: str) -> str:
    return name.rpartition(".")[2]


class _Elsewhere(nn.Module):
    """Calls a module that is registered under another name."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self._modules_elsewhere = (module,)  # a tuple, so that it is not registered here too

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self._modules_elsewhere[0](x)
        return y


def separate_experts(
    layers: Iterable[nn.Module], table: Architecture, config: PreTrainedConfig
) -> None:
    """Put a :class:`SparseMoe` with new weights, on the device and in the dtype of the old, into
    each decoder layer.

    Args:
        layers: decoder layers of transformers' model, whose feed-forward is called ``mlp``.
        table, config: of the model; nothing is done to a family without experts.
    """
    if table.experts is None:
        return
    for layer in layers:
        old = next(layer.get_submodule("mlp").parameters())
        with torch.device(old.device):
            moe = SparseMoe(table, config).to(old.dtype)
        name = table.experts.router.rpartition(".")[0]
        layer.add_module("mlp", _Elsewhere(moe))
        layer.add_module(name, moe)
