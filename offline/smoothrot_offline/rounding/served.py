# SPDX-License-Identifier: Apache-2.0
"""A decoder layer as the server runs it: its linears read their inputs rotated, or rotated and
quantized."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from smoothrot_offline.source.architecture import Architecture
from smoothrot_offline.source.family import ModelSpec
from smoothrot_offline.source.stream import LayerInStream
from smoothrot_offline.transform.rotation import hadamard
from smoothrot_vllm import ops, reference
from smoothrot_vllm.format import ActivationScheme, LinearScheme, Online
from smoothrot_vllm.reference import decode

InputMap = Callable[[torch.Tensor], torch.Tensor]


def ops_on(device: torch.device) -> Any:
    """What computes the served ops on a device: the compiled ones on the CPU; elsewhere their
    definitions in plain torch, which give the same bits, as the library may have been built for
    the CPU alone."""
    return ops if device.type == "cpu" else reference


def rotations(table: Architecture, online: Online) -> dict[str, InputMap]:
    """What the server does to the input of each rotated linear of a layer before it quantizes, by
    name relative to the layer, whose table is given."""
    found = {linear: online.rotation(linear) for linear in table.linears}
    return {
        linear: _rotator(rotation.block)
        for linear, rotation in found.items()
        if rotation is not None
    }


def quantizers(schemes: Mapping[str, LinearScheme | None], online: Online) -> dict[str, InputMap]:
    """Rotation and quantization of the input of each linear that has a scheme, with the served
    ops."""
    maps = {}
    for linear, scheme in schemes.items():
        rotation = online.rotation(linear)
        if scheme is not None:
            maps[linear] = _fake_quantizer(
                scheme.activations, 0 if rotation is None else rotation.block
            )
    return maps


@contextmanager
def inputs_through(layer: nn.Module, maps: Mapping[str, InputMap]) -> Iterator[None]:
    """While the context lasts, each named linear of ``layer`` reads its input through the given
    function."""

    def hook(function: InputMap) -> Callable[[nn.Module, tuple[torch.Tensor, ...]], torch.Tensor]:
        return lambda _module, inputs: function(inputs[0])

    handles = [
        layer.get_submodule(linear).register_forward_pre_hook(hook(function))
        for linear, function in maps.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def output_of(model: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
    """What the one layer of a built model makes of ``hidden (samples, seqlen, spec.stream)``."""
    found: torch.Tensor = model(inputs_embeds=hidden, use_cache=False).last_hidden_state
    return found


class BuiltLayer:
    """A decoder layer of a built model that can be run half by half, so that nothing runs twice for
    want of a rounded linear.

    The attention half ends in the residual stream after o_proj; the feed-forward half begins there.
    Linears read their inputs through ``maps``; set a linear's weight with :meth:`set_weight` and
    what follows it reads the new one.

    Args:
        model, layer: from :meth:`~smoothrot_offline.source.layers.LayerRunner.build`.
        spec: the model.
        table: of the layer.
        maps: run-time inputs by linear, see :func:`rotations` and :func:`quantizers`.
    """

    def __init__(
        self,
        model: nn.Module,
        layer: nn.Module,
        spec: ModelSpec,
        table: Architecture,
        maps: Mapping[str, InputMap],
    ) -> None:
        self._model = model
        self._layer = layer
        self._table = table
        self._residual_scale = spec.residual_scale
        self._hidden = spec.hidden
        self._maps = maps
        posts = [layer.get_submodule(name) for name in table.post_norms] or [
            nn.Identity(),
            nn.Identity(),
        ]
        self._after_attention, self._after_feed_forward = posts
        self._norm = layer.get_submodule(table.mlp_norm) if table.norms else nn.Identity()
        self._feed_forward = layer.get_submodule(table.feed_forward)

    def set_weight(self, linear: str, weight: torch.Tensor) -> None:
        """Replace the weight ``(out, in)`` of a linear, named relative to the layer."""
        self._layer.get_submodule(linear).weight.data = weight

    def attention_input(self, hidden: torch.Tensor) -> torch.Tensor:
        """What q, k and v multiply by their weights, ``(samples, seqlen, hidden)``, when the
        layer reads ``hidden``, like all here ``(samples, seqlen, spec.stream)``."""
        query = self._table.readers[self._table.attention_norm][0]
        return self.attention_part_input(query, hidden)

    def output_input(self, hidden: torch.Tensor) -> torch.Tensor:
        """What o_proj multiplies by its weight, ``(samples, seqlen, query width)``, when the
        layer reads ``hidden``."""
        return self.attention_part_input(self._table.output, hidden)

    def attention_part_input(self, linear: str, hidden: torch.Tensor) -> torch.Tensor:
        """What a linear of attention multiplies by its weight, ``(samples, seqlen, channels)``,
        when the layer reads ``hidden``."""
        return self._stopped(linear, lambda: output_of(self._model, hidden))

    def middle(self, hidden: torch.Tensor, output_input: torch.Tensor) -> torch.Tensor:
        """The residual stream between the halves, from what the layer reads and what o_proj
        reads."""
        added: torch.Tensor = self._after_attention(
            self._layer.get_submodule(self._table.output)(output_input)
        )
        if not isinstance(self._model, LayerInStream):
            return hidden + added * self._residual_scale
        stream, width = hidden, self._hidden
        if self._model.is_source:
            with inputs_through(self._layer, self._maps):
                stream = output_of(self._model, hidden)
        middle = hidden[..., :width] + added * self._residual_scale
        return torch.cat([middle, stream[..., width:]], dim=-1)

    def feed_forward_input(self, linear: str, middle: torch.Tensor) -> torch.Tensor:
        """What a linear of the feed-forward, one that reads every token, multiplies by its
        weight."""
        return self._stopped(linear, lambda: self._fed_forward(middle))

    def expert_inputs(
        self, middle: torch.Tensor, linears: Iterable[str], routing: torch.Tensor | None = None
    ) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        """What linears of experts multiply by their weights, and the routing: the router's output,
        ``(tokens, experts)``.

        Args:
            middle: the residual stream between the halves.
            linears: names relative to the layer. One whose expert gets no token is not in the
                result, which has for each other the tokens routed to it, ``(tokens, channels)``.
            routing: the tokens are sent to experts by this in place of the router's own output.
        """
        assert self._table.experts is not None
        router = self._layer.get_submodule(self._table.experts.router)
        seen: dict[str, torch.Tensor] = {}
        routed: list[torch.Tensor] = []

        def watching(linear: str) -> InputMap:
            return lambda x: seen.setdefault(linear, x)

        def route(
            _module: nn.Module, _inputs: tuple[torch.Tensor, ...], output: torch.Tensor
        ) -> torch.Tensor:
            routed.append(output if routing is None else routing)
            return routed[0]

        handle = router.register_forward_hook(route)
        # Hooks run in the order they were registered: a watcher sees what the run-time input map
        # has made of the input.
        with (
            inputs_through(self._layer, self._maps),
            inputs_through(self._layer, {name: watching(name) for name in linears}),
        ):
            self._fed_forward(middle)
        handle.remove()
        return seen, routed[0]

    def finish(self, middle: torch.Tensor) -> torch.Tensor:
        """What the layer returns."""
        with inputs_through(self._layer, self._maps):
            if isinstance(self._model, LayerInStream):
                return self._model.after_attention(middle)
            added: torch.Tensor = self._after_feed_forward(self._fed_forward(middle))
        return middle + added * self._residual_scale

    def _fed_forward(self, middle: torch.Tensor) -> torch.Tensor:
        """What the feed-forward gives out."""
        found = self._feed_forward(self._norm(middle[..., : self._hidden]))
        fed: torch.Tensor = found[0] if isinstance(found, tuple) else found
        return fed

    def _stopped(self, linear: str, run: Callable[[], object]) -> torch.Tensor:
        """What ``linear`` multiplies by its weight while ``run`` runs; it is run no further."""
        with inputs_through(self._layer, self._maps):
            return _seen_by(self._layer.get_submodule(linear), run)


class _InputSeenError(Exception):
    """Ends a forward pass whose one purpose was to see the input of a linear."""


def _seen_by(linear: nn.Module, run: Callable[[], object]) -> torch.Tensor:
    seen: list[torch.Tensor] = []

    def stop(_module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        seen.append(inputs[0])
        raise _InputSeenError

    # Pre-hooks run in the order they were registered: this one sees what the run-time hook has made
    # of the input.
    handle = linear.register_forward_pre_hook(stop)
    try:
        run()
    except _InputSeenError:
        return seen[0]
    finally:
        handle.remove()
    raise AssertionError("the layer runs each of its linears")


def _rotator(block: int) -> InputMap:
    return lambda x: hadamard(x, block)


def _fake_quantizer(scheme: ActivationScheme, block: int) -> InputMap:
    def quantize(x: torch.Tensor) -> torch.Tensor:
        tokens = x.flatten(0, -2)
        kernels = ops_on(x.device)
        if block:
            codes, scale = kernels.hadamard_quant(tokens, block, scheme.clip, scheme.bits)
        else:
            codes, scale = kernels.quant(tokens, scheme.clip, scheme.bits)
        return (decode(codes, scheme.bits) * scale[:, None]).view(x.shape)

    return quantize
