# SPDX-License-Identifier: Apache-2.0
"""The quantized linear layer: load stored codes and scales, repack them once, run one opaque op."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import torch
from vllm.model_executor.layers.linear import (
    LinearMethodBase,
    register_weight_loader_v2_supported_method,
)
from vllm.model_executor.parameter import (
    ChannelQuantScaleParameter,
    ModelWeightParameter,
    PackedvLLMParameter,
)

from smoothrot_vllm import ops
from smoothrot_vllm.errors import UnsupportedModelError
from smoothrot_vllm.format import (
    WEIGHT_GROUP_SCALE,
    WEIGHT_PACKED,
    WEIGHT_SCALE,
    LinearScheme,
    OnlineHadamard,
    weight_tensors,
)
from smoothrot_vllm.plugin.loading import (
    StoredTensors,
    as_loaded,
    check_scales,
    loaded_tensors,
)

_QKV_PARTS = {"q": 0, "k": 1, "v": 2}


@dataclass(frozen=True)
class GateUp:
    """What SiLU and down_proj are still to be applied to.

    Args:
        values: ``(..., 2 K)``, gate before up.
        reader: vLLM's name of the down_proj that takes it.
    """

    values: torch.Tensor
    reader: str


@register_weight_loader_v2_supported_method
class SmoothRotLinearMethod(LinearMethodBase):
    """``y = dequantize(quantize(x (I (x) H)) @ W^T) + bias`` for one layer of vLLM (see
    ``reference.gemm``).

    Args:
        prefix: vLLM's full name of the layer.
        scheme: bits, group size and activation clip.
        rotation: the online Hadamard of the layer's whole input, or None.
        parts: names of the stored linears whose rows this layer stacks; one name unless vLLM fuses.
            The first may hold several of vLLM's shards (``in_proj_qkv`` three), the others one.
        stored_fused: the checkpoint stores what vLLM fuses as the one linear that ``parts`` names.
    """

    def __init__(
        self,
        prefix: str,
        scheme: LinearScheme,
        rotation: OnlineHadamard | None,
        parts: list[str],
        stored_fused: bool = False,
    ) -> None:
        self.prefix = prefix
        self.parts = parts
        self.stored_fused = stored_fused
        self.weights = scheme.weights
        self.stored = StoredTensors(prefix, scheme, rotation)
        self.names: tuple[str, ...] = ()
        self._shards_of_first = 1

    def create_weights(
        self,
        layer: torch.nn.Module,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Callable[..., None],
    ) -> None:
        """Register ``weight_packed``, ``weight_scale`` and, in groups, ``weight_group_scale`` of
        this rank's shard, with the shapes of ``loading.loaded_tensors``.

        Raises:
            ConfigError: the layer's width, or a rank's share of it, does not suit the Hadamard
                block or the group size.
            UnsupportedModelError: vLLM fuses linears here without telling which.
        """
        shards, parts = len(output_partition_sizes), len(self.parts)
        if not self.stored_fused and (parts > shards or parts == 1 < shards):
            raise UnsupportedModelError(
                f"{self.prefix}: vLLM fuses {shards} linears here, but the"
                f" model's packed_modules_mapping names {parts}"
                f" ({', '.join(self.parts)}). This model class cannot be served quantized."
            )
        self._shards_of_first = 1 if self.stored_fused else shards - parts + 1
        self.stored.begin(input_size, input_size_per_partition)
        weights = self.weights
        tensors = loaded_tensors(sum(output_partition_sizes), input_size_per_partition, weights)
        whole = weight_tensors(output_size, input_size, weights)

        def loader(name: str) -> Callable[..., None]:
            load = extra_weight_attrs["weight_loader"]
            return self._checked_loader(load, name, whole[name], input_size)

        shape, dtype = tensors[WEIGHT_PACKED]
        packing = {"packed_dim": 1, "packed_factor": 2} if weights.bits == 4 else {}
        packed_class = PackedvLLMParameter if weights.bits == 4 else ModelWeightParameter
        codes = torch.empty(shape, dtype=dtype)
        packed = packed_class(
            data=codes, input_dim=1, output_dim=0, weight_loader=loader(WEIGHT_PACKED), **packing
        )
        layer.register_parameter(WEIGHT_PACKED, packed)
        shape, dtype = tensors[WEIGHT_SCALE]
        nan = torch.full(shape, torch.nan, dtype=dtype)
        # The same on every rank of a row-parallel layer.
        scale = ChannelQuantScaleParameter(
            data=nan, output_dim=0, weight_loader=loader(WEIGHT_SCALE)
        )
        layer.register_parameter(WEIGHT_SCALE, scale)
        if WEIGHT_GROUP_SCALE in tensors:
            shape, dtype = tensors[WEIGHT_GROUP_SCALE]
            group_scale = ModelWeightParameter(
                data=torch.ones(shape, dtype=dtype),
                input_dim=1,
                output_dim=0,
                weight_loader=loader(WEIGHT_GROUP_SCALE),
            )
            layer.register_parameter(WEIGHT_GROUP_SCALE, group_scale)
        self.names = tuple(tensors)

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        """Check that every part arrived with usable scales, then repack the codes for the kernels
        and free the originals.

        Raises:
            CheckpointError: a tensor is missing, or a scale is not a finite number above zero.
        """
        expected = [self._name(part, name) for part in self.parts for name in self.names]
        if self.stored.finish(expected):
            for scales in self.names[1:]:
                check_scales(
                    layer.get_parameter(scales).data[: self.stored_rows(layer)],
                    lambda row, column, scales=scales: (
                        f"{self.prefix}.{scales} (parts {', '.join(self.parts)}), row {row},"
                        f" column {column}"
                    ),
                )
        self.stored.repack(layer)

    def apply(
        self, layer: torch.nn.Module, x: torch.Tensor | GateUp, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        """``(..., input_size_per_partition)``, or what is to become it, to ``(..., rows of this
        rank)`` in the dtype of ``x``.

        Raises:
            UnsupportedModelError: the model hands a layer what another one was to read.
        """
        packed = cast(torch.Tensor, layer.weight_packed)
        scale = cast(torch.Tensor, layer.weight_scale)
        numbers = self.stored.numbers
        if not isinstance(x, GateUp):
            return ops.linear(x, packed, scale, bias, *numbers)
        if x.reader != self.prefix:
            raise UnsupportedModelError(
                f"{self.prefix}: expected its own input, got gate and up of {x.reader}: the model"
                " does not read its activations as an MLP does. Serve it with --additional-config"
                " '{\"smoothrot_fuse_silu\": false}'."
            )
        return ops.silu_mul_linear(x.values, packed, scale, bias, *numbers)

    def stored_rows(self, layer: torch.nn.Module) -> int | None:
        """How many of this rank's rows come from the checkpoint, None for all."""
        return None

    def _name(self, part: str, tensor: str) -> str:
        parent = self.prefix.rpartition(".")[0]
        return ".".join(filter(None, (parent, part, tensor)))

    def _checked_loader(
        self,
        load: Callable[..., None],
        tensor: str,
        whole: tuple[tuple[int, int], torch.dtype],
        width: int,
    ) -> Callable[..., None]:
        """vLLM's loader of ``tensor``, which on all ranks is ``whole``, of ``width`` inputs, behind
        our checks."""

        def loader(
            param: torch.nn.Parameter,
            stored: torch.Tensor,
            *shard: str | int | tuple[int, ...] | None,
        ) -> None:
            names = [self._name(part, tensor) for part in self._parts_of(*shard)]
            self.stored.take(
                names,
                whole,
                stored,
                param,
                lambda: load(param, as_loaded(tensor, stored, width, self.weights), *shard),
                some_rows=True,
            )

        return loader

    def _parts_of(self, shard: str | int | tuple[int, ...] | None = None) -> list[str]:
        """The parts that vLLM's shard id stands for; without one the tensor holds the whole
        layer.

        Raises:
            UnsupportedModelError: it stands for a piece of a part.
        """
        if shard is None:
            return self.parts
        if isinstance(shard, str):
            return [self.parts[_QKV_PARTS[shard]]]
        shards = shard if isinstance(shard, tuple) else (shard,)
        first = self._shards_of_first
        if any(i < first for i in shards) and not set(range(first)) <= set(shards):
            raise UnsupportedModelError(
                f"{self.prefix}: expected {self.parts[0]} as the first {first} shards of what vLLM"
                f" fuses here, got shards {shards}. This model class cannot be served quantized."
            )
        return [self.parts[max(0, i - first + 1)] for i in shards if i == 0 or i >= first]
