# SPDX-License-Identifier: Apache-2.0
"""Quantized experts: load the stored codes and scales of each, repack them once, run one opaque
op for all of them."""

from collections.abc import Callable
from typing import TYPE_CHECKING, cast

import torch
from vllm.model_executor.layers.fused_moe import FusedMoEMethodBase
from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from vllm.model_executor.layers.fused_moe.config import FusedMoEConfig, FusedMoEQuantConfig
from vllm.platforms import current_platform

from smoothrot_vllm import ops
from smoothrot_vllm.errors import ConfigError, UnsupportedModelError, UnsupportedPlatformError
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

if TYPE_CHECKING:
    from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
    from vllm.model_executor.layers.fused_moe.runner.shared_experts import SharedExperts

_STACKS = {"w13": ("w1", "w3"), "w2": ("w2",)}
"""What vLLM stacks into one parameter: the parts by its own shard ids."""

_BIAS = "bias"
_BIASED = {MoEActivation.SILU: False, MoEActivation.SWIGLUOAI: True}
"""Whether experts with an activation that there is an op for have biases."""
_GRANULE = 32
"""Inputs that enter one MMA of the CUDA kernels, csrc/cuda/launch.h."""


def check_experts(prefix: str, moe: FusedMoEConfig) -> None:
    """Refuse what is not implemented for experts.

    Args:
        prefix: vLLM's full name of the layer.
        moe: vLLM's description of it.

    Raises:
        ConfigError: an option of the server that does not go with quantized experts.
        UnsupportedModelError: experts of another kind than the format covers.
        UnsupportedPlatformError: biases, on a GPU.
    """
    parallel = moe.moe_parallel_config
    for option, given in {
        "--enable-expert-parallel": parallel.use_ep,
        "--enable-eplb": parallel.enable_eplb,
        "--data-parallel-size": parallel.dp_size > 1,
        "--enable-lora": moe.is_lora_enabled,
    }.items():
        if given:
            raise ConfigError(
                f"{prefix}: expected no {option}, which quantized experts do not support. Serve"
                " without it; --tensor-parallel-size divides each expert."
            )
    numbers = (moe.swiglu_limit, moe.swiglu_alpha)
    if _BIASED.get(moe.activation) != moe.has_bias or numbers != (None, None):
        raise UnsupportedModelError(
            f"{prefix}: expected experts of the form down(silu(gate(x)) * up(x)) without biases, or"
            f" those of gpt-oss, swigluoai with biases, got activation {moe.activation.value}, bias"
            f" {moe.has_bias}, limit {moe.swiglu_limit}, alpha {moe.swiglu_alpha}. Serve the 16-bit"
            " model instead."
        )
    if moe.has_bias and not current_platform.is_cpu():
        raise UnsupportedPlatformError(
            f"{prefix}: expected experts without biases, as no kernel for GPUs adds any or computes"
            f" {moe.activation.value}. Serve on a CPU."
        )


class SmoothRotExpertsMethod(FusedMoEMethodBase):
    """The experts of one layer of vLLM, see ``reference.experts``.

    Args:
        prefix: vLLM's full name of the layer; its experts are stored as ``prefix.NUMBER``.
        scheme: bits, group size and activation clip of all its linears.
        rotation: the online Hadamard of down_proj's whole input, or None.
        moe: vLLM's description of the layer.
        names: what the checkpoint calls gate, down and up, by vLLM's shard id (``w1``, ``w2``,
            ``w3``).

    Raises:
        ConfigError, UnsupportedModelError, UnsupportedPlatformError: see :func:`check_experts`.
    """

    def __init__(
        self,
        prefix: str,
        scheme: LinearScheme,
        rotation: OnlineHadamard | None,
        moe: FusedMoEConfig,
        names: dict[str, str],
    ) -> None:
        super().__init__(moe)
        check_experts(prefix, moe)
        self.prefix, self.names = prefix, names
        self.weights = scheme.weights
        self.stored = StoredTensors(prefix, scheme, rotation)
        self.suffixes: tuple[str, ...] = ()

    # As in vLLM's own base class of these methods, the signatures are narrower than those of its
    # base.
    def create_weights(  # type: ignore[override]
        self,
        layer: "RoutedExperts",
        num_experts: int,
        hidden_size: int,
        intermediate_size_per_partition: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Callable[..., bool | None],
    ) -> None:
        """Register ``w13_*`` and ``w2_*`` of this rank's shard: those of ``loading.loaded_tensors``
        for each expert, stacked.

        Raises:
            ConfigError: the experts' width, or a rank's share of it, does not suit the Hadamard
                block or the group size.
            UnsupportedModelError: what experts read is multiplied by their weights.
            UnsupportedPlatformError: a width does not suit the CUDA kernels that are to compute it.
        """
        if layer.apply_router_weight_on_input:
            raise UnsupportedModelError(
                f"{self.prefix}: apply_router_weight_on_input: expected False, what experts give"
                " out multiplied by their weights, got True. Serve the 16-bit model instead."
            )
        self.stored.begin(self.moe.intermediate_size, intermediate_size_per_partition)
        if not current_platform.is_cpu():
            self._check_granules(
                {
                    "hidden channels": hidden_size,
                    "channels of a rank's experts": intermediate_size_per_partition,
                }
            )
        weights, whole = self.weights, self.moe.intermediate_size
        shards = {
            "w13": loaded_tensors(2 * intermediate_size_per_partition, hidden_size, weights),
            "w2": loaded_tensors(hidden_size, intermediate_size_per_partition, weights),
        }
        stored = {
            "w13": weight_tensors(whole, hidden_size, weights),
            "w2": weight_tensors(hidden_size, whole, weights),
        }
        widths = {"w13": hidden_size, "w2": whole}
        self.suffixes = tuple(stored["w2"])
        for stack, tensors in shards.items():
            for suffix, (shape, dtype) in tensors.items():
                unset = torch.nan if dtype.is_floating_point else 1
                data = torch.full((num_experts, *shape), unset, dtype=dtype)
                parameter = torch.nn.Parameter(data, requires_grad=False)
                load = self._checked_loader(
                    extra_weight_attrs["weight_loader"],
                    suffix,
                    stored[stack][suffix],
                    widths[stack],
                )
                # What vLLM's loader of expert weights asks of a parameter: scales of a channel are
                # on every rank, those of groups are sharded like codes.
                attributes = {
                    "weight_loader": load,
                    "quant_method": "group" if suffix == WEIGHT_GROUP_SCALE else "channel",
                }
                for name, value in attributes.items():
                    setattr(parameter, name, value)
                layer.register_parameter(f"{stack}_{suffix}", parameter)
        if self.moe.has_bias:
            self._create_biases(
                layer,
                num_experts,
                {"w13": intermediate_size_per_partition, "w2": hidden_size},
                params_dtype,
            )

    def _create_biases(
        self, layer: "RoutedExperts", experts: int, rows: dict[str, int], dtype: torch.dtype
    ) -> None:
        """Register ``w13_bias`` and ``w2_bias``; ``rows`` are this rank's of each part of a
        stack."""
        self.suffixes = (*self.suffixes, _BIAS)
        for stack, parts in _STACKS.items():
            height = rows[stack]
            data = torch.full((experts, height * len(parts)), torch.nan, dtype=dtype)
            parameter = torch.nn.Parameter(data, requires_grad=False)
            parameter.weight_loader = self._bias_loader(height)  # type: ignore[attr-defined]
            layer.register_parameter(f"{stack}_{_BIAS}", parameter)

    def _bias_loader(self, height: int) -> Callable[..., bool | None]:
        """Loads ``height`` rows, this rank's, of one expert's bias. What down gives is summed over
        ranks, so the first one alone adds its bias."""

        def loader(
            param: torch.nn.Parameter,
            loaded_weight: torch.Tensor,
            weight_name: str,
            shard_id: str,
            expert_id: int,
            return_success: bool = False,
        ) -> bool | None:
            rank, is_down = self.moe.moe_parallel_config.tp_rank, shard_id == "w2"
            own = param.data[expert_id].narrow(0, height if shard_id == "w3" else 0, height)

            def load() -> None:
                if is_down:
                    own.copy_(loaded_weight if rank == 0 else torch.zeros_like(loaded_weight))
                else:
                    own.copy_(loaded_weight.narrow(0, rank * height, height))

            whole = height if is_down else self.moe.intermediate_size
            dtype = loaded_weight.dtype if loaded_weight.is_floating_point() else param.dtype
            self.stored.take(
                [self._name(expert_id, shard_id, _BIAS)],
                ((whole,), dtype),
                loaded_weight,
                param,
                load,
            )
            return True if return_success else None

        return loader

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        """Check that every tensor arrived with usable scales, then repack the codes for the kernels
        and free the originals.

        Raises:
            CheckpointError: a tensor is missing, or a scale is not a finite number above zero.
        """
        expected = [
            self._name(expert, shard, tensor)
            for expert in range(self.moe.num_local_experts)
            for shard in self.names
            for tensor in self.suffixes
        ]
        if self.stored.finish(expected):
            self._check_scales(layer)
        for stack in _STACKS:
            self.stored.repack(layer, f"{stack}_")

    def get_fused_moe_quant_config(self, layer: "RoutedExperts") -> FusedMoEQuantConfig | None:
        """None: it configures vLLM's own kernels, none of which run."""
        return None

    def apply(  # type: ignore[override]
        self,
        layer: "RoutedExperts",
        x: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        shared_experts: "SharedExperts | None",
        shared_experts_input: torch.Tensor | None,
    ) -> torch.Tensor:
        """``(tokens, hidden)`` to this rank's part of the same, in the dtype of ``x``."""
        stacks = [
            cast(torch.Tensor, getattr(layer, f"{stack}_{suffix}"))
            for stack in _STACKS
            for suffix in (WEIGHT_PACKED, WEIGHT_SCALE)
        ]
        biases = [getattr(layer, f"{stack}_{_BIAS}", None) for stack in _STACKS]
        return ops.experts(
            x.contiguous(),
            topk_weights.float(),
            topk_ids,
            *stacks,
            *self.stored.numbers,
            *biases,
            self.moe.activation.value,
        )

    def _check_granules(self, widths: dict[str, int]) -> None:
        for what, size in widths.items():
            if size % _GRANULE:
                raise UnsupportedPlatformError(
                    f"{self.prefix}: {size} {what}: expected a multiple of {_GRANULE}, as the CUDA"
                    " kernels multiply that many at a time. Choose a smaller"
                    " --tensor-parallel-size, or serve on a CPU."
                )

    def _name(self, expert: int, shard: str, tensor: str) -> str:
        return f"{self.prefix}.{expert}.{self.names[shard]}.{tensor}"

    def _checked_loader(
        self,
        load: Callable[..., bool | None],
        tensor: str,
        whole: tuple[tuple[int, int], torch.dtype],
        width: int,
    ) -> Callable[..., bool | None]:
        """vLLM's loader of one expert's ``tensor``, which on all ranks is ``whole``, of ``width``
        inputs, behind our checks."""

        def loader(
            param: torch.nn.Parameter,
            loaded_weight: torch.Tensor,
            weight_name: str,
            shard_id: str,
            expert_id: int,
            return_success: bool = False,
        ) -> bool | None:
            done = self.stored.take(
                [self._name(expert_id, shard_id, tensor)],
                whole,
                loaded_weight,
                param,
                lambda: load(
                    param,
                    as_loaded(tensor, loaded_weight, width, self.weights),
                    weight_name,
                    shard_id,
                    expert_id,
                    return_success=True,
                ),
            )
            return done if return_success else None

        return loader

    def _check_scales(self, layer: torch.nn.Module) -> None:
        for stack, shards in _STACKS.items():
            for suffix in self.suffixes[1:]:
                if suffix == _BIAS:
                    continue
                scales = layer.get_parameter(f"{stack}_{suffix}").data
                rows = scales.shape[1] // len(shards)

                def name(
                    expert: int,
                    row: int,
                    column: int,
                    shards: tuple[str, ...] = shards,
                    rows: int = rows,
                    suffix: str = suffix,
                ) -> str:
                    shard = self._name(expert, shards[row // rows], suffix)
                    return f"{shard}, row {row % rows}, column {column}"

                check_scales(scales, name)
