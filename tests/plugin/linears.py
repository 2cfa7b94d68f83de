# SPDX-License-Identifier: Apache-2.0
"""Linears as a checkpoint stores them, and vLLM's layers that load them."""

from dataclasses import dataclass
from typing import Any

import torch
from vllm.model_executor.layers.linear import (
    LinearBase,
    MergedColumnParallelLinear,
    QKVParallelLinear,
    RowParallelLinear,
)
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

from smoothrot_vllm import reference
from smoothrot_vllm.format import WEIGHT_GROUP_SCALE, WEIGHT_PACKED, WEIGHT_SCALE
from smoothrot_vllm.plugin.quant_config import SmoothRotConfig

HIDDEN, INTERMEDIATE, HEAD, HEADS, KV_HEADS, VOCAB = 128, 192, 32, 4, 2, 261
GATE_UP, QKV, DOWN = (
    "model.layers.0.mlp.gate_up_proj",
    "model.layers.0.self_attn.qkv_proj",
    "model.layers.0.mlp.down_proj",
)
SCHEMES = {
    "w4 per channel": {"bits": 4, "group_size": -1},
    "w4 in groups of 32": {"bits": 4, "group_size": 32},
    "w8 per channel": {"bits": 8, "group_size": -1},
}


@dataclass
class Stored:
    """One linear of a checkpoint; group scales a byte each."""

    packed: torch.Tensor
    scale: torch.Tensor
    group_scale: torch.Tensor | None

    @classmethod
    def random(cls, rows: int, columns: int, weights: dict[str, int], seed: int) -> "Stored":
        generator = torch.Generator().manual_seed(seed)
        bits, group = weights["bits"], weights["group_size"]
        top = reference.quant_max(bits)
        codes = torch.randint(
            -top - 1, top + 1, (rows, columns), generator=generator, dtype=torch.int8
        )
        group_scale = None
        if group != -1:
            shape = (rows, columns // group)
            group_scale = torch.randint(1, 16, shape, generator=generator, dtype=torch.uint8)
        scale = torch.rand(rows, 1, generator=generator) + 0.5
        return cls(reference.encode(codes, bits), scale, group_scale)

    def tensors(self) -> dict[str, torch.Tensor]:
        """As a checkpoint has them."""
        tensors = {WEIGHT_PACKED: self.packed, WEIGHT_SCALE: self.scale}
        if self.group_scale is not None:
            tensors[WEIGHT_GROUP_SCALE] = reference.pack_group_scale(self.group_scale)
        return tensors

    def load_into(self, layer: torch.nn.Module, *shard: int | str | tuple[int, ...]) -> None:
        for name, tensor in self.tensors().items():
            load(layer, name, tensor, *shard)

    def of_rank(self, rank: int, size: int) -> "Stored":
        """What a rank has of a linear whose inputs are divided."""
        groups = self.group_scale
        return Stored(
            self.packed.chunk(size, dim=1)[rank],
            self.scale,
            None if groups is None else groups.chunk(size, dim=1)[rank],
        )


def load(
    layer: torch.nn.Module, name: str, tensor: torch.Tensor, *shard: int | str | tuple[int, ...]
) -> None:
    """As vLLM's model classes do with a tensor of the checkpoint."""
    parameter: Any = getattr(layer, name)
    parameter.weight_loader(parameter, tensor, *shard)


def linear_reference(
    x: torch.Tensor, stored: Stored, layer_config: SmoothRotConfig, block: int = 0
) -> torch.Tensor:
    weights, acts = layer_config.schema.weights, layer_config.schema.activations
    codes, scale = (
        reference.hadamard_quant(x, block, acts.clip, acts.bits)
        if block
        else reference.quant(x, acts.clip, acts.bits)
    )
    weight = (stored.packed, stored.scale, stored.group_scale)
    return reference.gemm(codes, scale, *weight, None, x.dtype, acts.bits, weights.bits)


def tokens(columns: int, count: int = 5) -> torch.Tensor:
    return torch.randn(count, columns, generator=torch.Generator().manual_seed(7))


def qkv(config: SmoothRotConfig, heads: int = HEADS) -> QKVParallelLinear:
    return QKVParallelLinear(
        HIDDEN,
        HEAD,
        heads,
        KV_HEADS,
        bias=False,
        quant_config=config,
        prefix=QKV,
        return_bias=False,
    )


def gate_up(config: SmoothRotConfig) -> MergedColumnParallelLinear:
    sizes = [INTERMEDIATE, INTERMEDIATE]
    return MergedColumnParallelLinear(
        HIDDEN, sizes, bias=False, quant_config=config, prefix=GATE_UP, return_bias=False
    )


def in_proj_qkvz(config: SmoothRotConfig) -> MergedColumnParallelLinear:
    return MergedColumnParallelLinear(
        HIDDEN,
        [64, 64, 96, 96],
        bias=False,
        quant_config=config,
        prefix="model.layers.0.linear_attn.in_proj_qkvz",
        return_bias=False,
    )


def down(
    config: SmoothRotConfig, bias: bool = False, width: int = INTERMEDIATE
) -> RowParallelLinear:
    return RowParallelLinear(
        width,
        HIDDEN,
        bias=bias,
        quant_config=config,
        prefix=DOWN,
        return_bias=False,
        reduce_results=bias,
    )


def finish(layer: LinearBase | ParallelLMHead) -> None:
    layer.quant_method.process_weights_after_loading(layer)
