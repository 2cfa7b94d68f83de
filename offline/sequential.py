# SPDX-License-Identifier: Apache-2.0
"""Error-compensated rounding of one decoder layer: each linear is rounded for the input it will read at run time.

Two copies of the calibration's hidden states travel through the model: one through the layers as they are served
(codes, scales and quantised activations), and, for asymmetric calibration, one through the transformed layers in full
precision. Within a layer the linears are rounded in the order data reaches them (qkv, o, gate and up, down), and each
group reads what the already rounded ones before it produce.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import nn

from smoothrot_offline.architectures import ModelSpec
from smoothrot_offline.calibrate import CHUNK_TOKENS, LayerRunner
from smoothrot_offline.quantize import HessianAccumulator, QuantizedWeight, quantize_gptq
from smoothrot_vllm import ops
from smoothrot_vllm.format import ActivationScheme, QuantizationSchema
from smoothrot_vllm.reference import decode, hadamard_transform

InputMap = Callable[[torch.Tensor], torch.Tensor]


class SequentialRounding:
    """Rounds the layers of one model in order; keeps the hidden states that the next layer reads.

    Args:
        runner: builds single decoder layers.
        spec: the model's sizes and names.
        schema: how each linear is quantised.
        hidden: float32 ``(samples, seqlen, hidden)``, the transformed embedding of the calibration tokens; it is changed.
        asymmetric: aim at the full-precision model's outputs (GPTAQ, arXiv 2504.02692) rather than at those of the rounded
            model's own inputs (GPTQ, arXiv 2210.17323).
        propagation: share of the earlier layers' error that asymmetric calibration makes up for; all of it follows the
            noise of the calibration text.
        act_order, damping: see :func:`~smoothrot_offline.quantize.quantize_gptq`.
    """

    def __init__(
        self,
        runner: LayerRunner,
        spec: ModelSpec,
        schema: QuantizationSchema,
        hidden: torch.Tensor,
        *,
        asymmetric: bool,
        propagation: float,
        act_order: bool,
        damping: float,
    ) -> None:
        self._runner = runner
        self._spec = spec
        self._schema = schema
        self._hidden = hidden
        self._asymmetric = asymmetric
        self._propagation = propagation
        self._exact = hidden.clone() if asymmetric else hidden
        self._act_order = act_order
        self._damping = damping

    def layer(self, index: int, tensors: dict[str, torch.Tensor]) -> dict[str, QuantizedWeight]:
        """Round decoder layer ``index`` and move the hidden states past it.

        Args:
            index: which layer; call in order.
            tensors: the transformed layer's tensors by names relative to it, any float dtype.

        Returns:
            The codes and scales of each quantised linear, named relative to the layer.
        """
        prefix = self._spec.layer_prefix(index)
        served, served_layer = self._runner.build(index, tensors)
        exact = self._runner.build(index, tensors) if self._asymmetric else None
        rounded: dict[str, QuantizedWeight] = {}
        with (
            torch.no_grad(),
            _inputs_through(served_layer, self._quantisers(prefix)),
            _inputs_through(exact[1] if exact else None, self._rotations()),
        ):
            for group in self._groups(prefix):
                statistics = HessianAccumulator(tensors[f"{group[0]}.weight"].shape[1], self._asymmetric)
                for part, exact_part in self._chunks():
                    inputs = _input_of((served, served_layer), group[0], part)
                    statistics.add(inputs, _input_of(exact, group[0], exact_part) if exact else None)
                for linear in group:
                    rounded[linear] = self._round(prefix + linear, tensors[f"{linear}.weight"], statistics)
                    served_layer.get_submodule(linear).weight.data = rounded[linear].dequantize()
            for part, exact_part in self._chunks():
                part.copy_(served(inputs_embeds=part, use_cache=False).last_hidden_state)
                if exact is not None:
                    exact_part.copy_(exact[0](inputs_embeds=exact_part, use_cache=False).last_hidden_state)
        return rounded

    def _round(self, name: str, weight: torch.Tensor, statistics: HessianAccumulator) -> QuantizedWeight:
        scheme = self._schema.scheme(name)
        assert scheme is not None
        cross = statistics.cross
        return quantize_gptq(
            weight,
            statistics.hessian,
            scheme.weights,
            act_order=self._act_order,
            damping=self._damping,
            cross=None if cross is None else cross * self._propagation,
            name=f"{name}.weight",
        )

    def _groups(self, prefix: str) -> list[list[str]]:
        """Quantised linears that read the same tensor, in the order data reaches them."""
        groups = [
            [linear for linear in group if self._schema.scheme(prefix + linear) is not None]
            for group in self._spec.architecture.input_groups()
        ]
        return [group for group in groups if group]

    def _chunks(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        step = max(1, CHUNK_TOKENS // self._hidden.shape[1])
        return zip(self._hidden.split(step), self._exact.split(step), strict=True)

    def _rotations(self) -> dict[str, InputMap]:
        found = {linear: self._schema.online.rotation(linear) for linear in self._spec.architecture.linears}
        return {linear: _rotator(rotation.block) for linear, rotation in found.items() if rotation is not None}

    def _quantisers(self, prefix: str) -> dict[str, InputMap]:
        maps = self._rotations()
        for linear in self._spec.architecture.linears:
            scheme, rotation = self._schema.scheme(prefix + linear), self._schema.online.rotation(linear)
            if scheme is not None:
                maps[linear] = _fake_quantiser(scheme.activations, 0 if rotation is None else rotation.block)
        return maps


class _InputSeenError(Exception):
    """Ends a forward pass whose one purpose was to see the input of a linear."""


def _input_of(built: tuple[nn.Module, nn.Module], linear: str, hidden: torch.Tensor) -> torch.Tensor:
    """What ``linear`` of a built layer multiplies by its weight when the layer reads ``hidden``: ``(tokens, in_features)``."""
    model, layer = built
    seen: list[torch.Tensor] = []

    def stop(_module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        seen.append(inputs[0].flatten(0, -2))
        raise _InputSeenError

    # Pre-hooks run in the order they were registered: this one sees what the run-time hook has made of the input.
    handle = layer.get_submodule(linear).register_forward_pre_hook(stop)
    try:
        model(inputs_embeds=hidden, use_cache=False)
    except _InputSeenError:
        return seen[0]
    finally:
        handle.remove()
    raise AssertionError("the layer runs each of its linears")


def _rotator(block: int) -> InputMap:
    return lambda x: hadamard_transform(x, block) * block**-0.5


def _fake_quantiser(scheme: ActivationScheme, block: int) -> InputMap:
    def quantise(x: torch.Tensor) -> torch.Tensor:
        tokens = x.flatten(0, -2)
        if block:
            codes, scale = ops.hadamard_quant(tokens, block, scheme.clip, scheme.bits)
        else:
            codes, scale = ops.quant(tokens, scheme.clip, scheme.bits)
        return (decode(codes, scheme.bits) * scale[:, None]).view(x.shape)

    return quantise


@contextmanager
def _inputs_through(layer: nn.Module | None, maps: Mapping[str, InputMap]) -> Iterator[None]:
    """While the context lasts, each named linear of ``layer`` reads its input through the given function."""

    def hook(function: InputMap) -> Callable[[nn.Module, tuple[torch.Tensor, ...]], torch.Tensor]:
        return lambda _module, inputs: function(inputs[0])

    handles = []
    if layer is not None:
        handles = [layer.get_submodule(linear).register_forward_pre_hook(hook(function)) for linear, function in maps.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
