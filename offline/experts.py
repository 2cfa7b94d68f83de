# SPDX-License-Identifier: Apache-2.0
"""A mixture of experts as modules: a linear for each weight of the source, under the source's
names.

transformers holds the experts of a layer in two stacked tensors. Here each linear can be watched,
rotated, rounded and replaced by itself, as those of dense models are; what is computed is the same.
"""

from collections.abc import Iterable

import torch
from torch import nn
from transformers import PreTrainedConfig

from smoothrot_offline.architectures import Architecture


class Expert(nn.Module):
    """``down(silu(gate(x)) * up(x))``, each linear a submodule under the last part of its name
    in the family's table."""

    def __init__(self, table: Architecture, hidden: int, intermediate: int) -> None:
        super().__init__()
        assert table.experts is not None
        self._gate, self._up, self._down = (
            name.rpartition(".")[2] for name in (table.experts.gate, table.up, table.down)
        )
        self.add_module(self._gate, nn.Linear(hidden, intermediate, bias=False))
        self.add_module(self._up, nn.Linear(hidden, intermediate, bias=False))
        self.add_module(self._down, nn.Linear(intermediate, hidden, bias=False))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``(tokens, hidden)`` to the same."""
        gate, up, down = (self.get_submodule(name) for name in (self._gate, self._up, self._down))
        y: torch.Tensor = down(nn.functional.silu(gate(x)) * up(x))
        return y


class SparseMoe(nn.Module):
    """The router, and the weighted sum of the ``top_k`` experts that it chooses for a token.

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
        self.normalises = not names.normalises or getattr(config, names.normalises)
        self.gate = nn.Linear(config.hidden_size, count, bias=False)
        self.experts = nn.ModuleList(
            Expert(table, config.hidden_size, intermediate) for _ in range(count)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``(..., hidden)`` to the same; weighed and summed in float32, or in float64 for such
        inputs."""
        tokens = x.flatten(0, -2)
        wide = torch.promote_types(x.dtype, torch.float32)
        weights, chosen = self.gate(tokens).softmax(dim=-1, dtype=wide).topk(self.top_k, dim=-1)
        if self.normalises:
            weights = weights / weights.sum(dim=-1, keepdim=True)
        total = tokens.new_zeros(tokens.shape, dtype=wide)
        for number, expert in enumerate(self.experts):
            token, place = (chosen == number).nonzero(as_tuple=True)
            if token.numel():
                total.index_add_(0, token, expert(tokens[token]) * weights[token, place, None])
        return total.to(x.dtype).view(x.shape)


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
