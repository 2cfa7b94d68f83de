# SPDX-License-Identifier: Apache-2.0
"""Models with experts whose every linear is a module of its own."""

from itertools import chain
from typing import Any

import torch
from transformers import PreTrainedModel

from smoothrot_offline.source.experts import separate_experts
from smoothrot_offline.source.family import ModelSpec


def with_separate_experts(model: PreTrainedModel, spec: ModelSpec) -> PreTrainedModel:
    """``model`` with transformers' stacked experts taken apart, and the same weights; any other
    model as it is."""
    experts = spec.architecture.experts
    if experts is None:
        return model
    layers = model.model.layers
    stacked = [layer.mlp for layer in layers]
    separate_experts(layers, spec.architecture, model.config)
    for index, old in enumerate(stacked):
        table, prefix = spec.layer_table(index), spec.layer_prefix(index)
        if table.experts is None:
            continue
        if experts.interleaved:
            _take_interleaved(model, spec, prefix, old)
            continue
        router = model.get_submodule(prefix + experts.router)
        router.load_state_dict(old.gate.state_dict())
        weights = dict[str, torch.Tensor]()
        for e, (up, down) in enumerate(table.products[: spec.experts]):
            gate_rows, up_rows = old.experts.gate_up_proj.data[e].chunk(2)
            weights |= {
                experts.gate.replace("{e}", str(e)): gate_rows,
                up: up_rows,
                down: old.experts.down_proj.data[e],
            }
        common = [*chain.from_iterable(table.common_groups())]
        if experts.shared is not None and experts.shared.gate:
            common.append(experts.shared.gate)
        weights |= {
            name: old.get_submodule(name.removeprefix("mlp.")).weight.data for name in common
        }
        for name, weight in weights.items():
            model.get_submodule(prefix + name).weight.data = weight.contiguous()
    return model


def _take_interleaved(model: PreTrainedModel, spec: ModelSpec, prefix: str, old: Any) -> None:
    """The weights and biases of gpt-oss' feed-forward."""
    table = spec.architecture
    assert table.experts is not None
    model.get_submodule(prefix + table.experts.router).load_state_dict(old.router.state_dict())
    stacks = old.experts
    for e, (up, down) in enumerate(table.products):
        gate = table.experts.gate.replace("{e}", str(e))
        for name, stack, rows in (
            (gate, "gate_up_proj", slice(0, None, 2)),
            (up, "gate_up_proj", slice(1, None, 2)),
            (down, "down_proj", slice(None)),
        ):
            linear = model.get_submodule(prefix + name)
            linear.weight.data = getattr(stacks, stack).data[e, :, rows].T.contiguous()
            linear.bias.data = getattr(stacks, f"{stack}_bias").data[e, rows].contiguous()
