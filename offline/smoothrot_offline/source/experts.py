# SPDX-License-Identifier: Apache-2.0
"""A mixture of experts as modules: a linear for each weight, under the names of the family's
table."""

from collections.abc import Iterable

import torch
from torch import nn
from transformers import PreTrainedConfig

from smoothrot_offline.source.architecture import Architecture
from smoothrot_offline.source.parts import Experts
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


class Router(nn.Linear):
    """Gives out a logit of each expert, ``(tokens, experts)``, by which :meth:`choose` chooses.

    Args:
        names: what the family's table says of experts.
        config: of the model.
    """

    def __init__(self, names: Experts, config: PreTrainedConfig) -> None:
        count, routing = getattr(config, names.count), names.routing
        super().__init__(config.hidden_size, count, names.biased)
        self.top_k = config.num_experts_per_tok
        self._normalizes = not names.normalizes or getattr(config, names.normalizes)
        self._routing = routing
        self.groups, self.kept_groups = (
            getattr(config, key) if key else 1 for key in (routing.groups, routing.kept_groups)
        )
        self._scale = getattr(config, routing.scale) if routing.scale else 1.0
        if routing.correction:
            # A buffer, as in transformers: a model of 16 bits has it in float32.
            self.register_buffer(routing.correction, torch.zeros(count))

    def choose(self, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What the outputs of the chosen experts of each token are multiplied by, and their
        numbers: ``(tokens, top_k)``; in float32, or in float64 for such logits."""
        scores = self._scores(logits)
        chosen = self.preferences(logits).topk(self.top_k, dim=-1).indices
        weights = scores.gather(1, chosen)
        if self._normalizes:
            weights = weights / weights.sum(dim=-1, keepdim=True)
        return weights * self._scale, chosen

    def preferences(self, logits: torch.Tensor) -> torch.Tensor:
        """What experts are chosen by, ``(tokens, experts)``: the largest; those of groups that are
        left out have minus infinity."""
        found = self._ranks(logits)
        if self.groups == 1:
            return found
        kept = self.group_preferences(logits).topk(self.kept_groups, dim=-1).indices
        left_out = torch.ones(len(found), self.groups, dtype=torch.bool, device=found.device)
        left_out = left_out.scatter(1, kept, False)
        return found.masked_fill(
            left_out.repeat_interleave(found.shape[1] // self.groups, dim=1), -torch.inf
        )

    def group_preferences(self, logits: torch.Tensor) -> torch.Tensor:
        """What groups of experts are kept by, ``(tokens, groups)``: the largest."""
        grouped = self._ranks(logits).unflatten(-1, (self.groups, -1))
        return grouped.topk(self._routing.of_group, dim=-1).values.sum(dim=-1)

    def _scores(self, logits: torch.Tensor) -> torch.Tensor:
        wide = torch.promote_types(logits.dtype, torch.float32)
        if self._routing.sigmoid:
            return logits.to(wide).sigmoid()
        return logits.softmax(dim=-1, dtype=wide)

    def _ranks(self, logits: torch.Tensor) -> torch.Tensor:
        """What a router without groups chooses by. Without a correction scores are in the order of
        logits, which are farther apart."""
        name = self._routing.correction
        return self._scores(logits) + self.get_buffer(name) if name else logits


class SparseMoe(nn.Module):
    """The router, and the weighted sum of the experts that it chooses for a token; beside them the
    shared expert, times the sigmoid of its gate if there is one.

    Args:
        table: a family with experts.
        config: of the model.
    """

    def __init__(self, table: Architecture, config: PreTrainedConfig) -> None:
        super().__init__()
        names = table.experts
        assert names is not None
        intermediate = getattr(config, names.intermediate)
        self._router = _leaf(names.router)
        self.add_module(self._router, Router(names, config))
        self.experts = nn.ModuleList(
            Expert(table, config.hidden_size, intermediate)
            for _ in range(getattr(config, names.count))
        )
        self._gives_scores = names.gives_scores
        self._shared = self._shared_gate = ""
        if (shared := names.shared) is not None:
            width = getattr(config, shared.intermediate)
            width *= getattr(config, shared.count) if shared.count else 1
            self._shared, self._shared_gate = _leaf(shared.module), _leaf(shared.gate)
            self.add_module(self._shared, Expert(table, config.hidden_size, width))
        if self._shared_gate:
            self.add_module(self._shared_gate, nn.Linear(config.hidden_size, 1, bias=False))

    @property
    def chooser(self) -> Router:
        """The router."""
        router = self.get_submodule(self._router)
        assert isinstance(router, Router)
        return router

    def forward(self, x: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, None]:
        """``(..., hidden)`` to the same, or to a pair that begins with it where transformers' layer
        reads one; weighed and summed in float32, or in float64 for such inputs."""
        tokens = x.flatten(0, -2)
        wide = torch.promote_types(x.dtype, torch.float32)
        total = self._of_all(tokens).to(wide)
        weights, chosen = self.chooser.choose(self.chooser(tokens))
        for number, expert in enumerate(self.experts):
            token, place = (chosen == number).nonzero(as_tuple=True)
            if token.numel():
                total.index_add_(0, token, expert(tokens[token]) * weights[token, place, None])
        given = total.to(x.dtype).view(x.shape)
        return (given, None) if self._gives_scores else given

    def _of_all(self, tokens: torch.Tensor) -> torch.Tensor:
        """What the shared expert makes of ``(tokens, hidden)``, zeros without one."""
        if not self._shared:
            return torch.zeros_like(tokens)
        found: torch.Tensor = self.get_submodule(self._shared)(tokens)
        if self._shared_gate:
            found = found * self.get_submodule(self._shared_gate)(tokens).sigmoid()
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
    each decoder layer that has experts.

    Args:
        layers: decoder layers of transformers' model, whose feed-forward is called ``mlp``.
        table, config: of the model; nothing is done to a family without experts.
    """
    if table.experts is None:
        return
    for layer in layers:
        replaced = layer.get_submodule("mlp")
        if not hasattr(replaced, "experts"):
            continue
        old = next(replaced.parameters())
        with torch.device(old.device):
            moe = SparseMoe(table, config).to(old.dtype)
        for buffer in moe.buffers():
            buffer.data = buffer.to(torch.promote_types(old.dtype, torch.float32))
        name = table.experts.router.rpartition(".")[0]
        layer.add_module("mlp", _Elsewhere(moe))
        layer.add_module(name, moe)
