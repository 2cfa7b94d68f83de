# SPDX-License-Identifier: Apache-2.0
"""The original model with a gradient, a layer at a time: as it is, or with folds in the graph and
its linears' inputs quantized as the server does it."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import cache

import torch
from torch import nn
from torch.func import functional_call

from smoothrot_offline.distill.products import QuantizedInputs, product_dtype
from smoothrot_offline.learn.folds import Folded
from smoothrot_offline.rounding.served import InputMap, inputs_through
from smoothrot_offline.source.layers import LAYER, LayerTensors, SourceModel
from smoothrot_offline.transform.rotation import DenseRotation
from smoothrot_offline.transform.sides import ModelTransform
from smoothrot_vllm.format import ActivationScheme, QuantizationSchema


class Decoder:
    """Decoder, final norm and head of the original model.

    Products have the faster of bfloat16 and float32, what is between them is float32.

    Args:
        source: the model, read from its files a layer at a time.
    """

    def __init__(self, source: SourceModel) -> None:
        self.source = source
        products = product_dtype(source.device)
        self._products = products
        self._skeleton = cache(lambda index: source.skeleton(index, source.device))
        self._norm = source.final_norm(source.tensor(source.norm_name))
        self._head = source.tensor(source.head_name).to(products)

    def autocast(self) -> AbstractContextManager[object]:
        """The context in which products have their dtype."""
        if self._products == torch.float32:
            return nullcontext()
        return torch.autocast(self.source.device.type, self._products)

    def module(self, index: int) -> nn.Module:
        """Decoder layer ``index``, whose weights :meth:`layer` brings along."""
        _, layer = self._skeleton(index)
        return layer

    def layer(
        self,
        index: int,
        weights: Mapping[str, torch.Tensor],
        hidden: torch.Tensor,
        maps: Mapping[str, InputMap],
    ) -> torch.Tensor:
        """What decoder layer ``index`` makes of ``hidden (samples, seqlen, spec.stream)``, float32.

        Args:
            weights: the layer's tensors, by names relative to it.
            maps: what linears read their inputs through.
        """
        model, layer = self._skeleton(index)
        named = {f"{LAYER}.{name}": tensor.float() for name, tensor in weights.items()}
        with self.autocast(), inputs_through(layer, maps):
            found = functional_call(model, named, (), {"inputs_embeds": hidden, "use_cache": False})
        states: torch.Tensor = found.last_hidden_state.float()
        return states

    def logits(self, states: torch.Tensor) -> torch.Tensor:
        """Of ``states (samples, seqlen, spec.stream)``, what the last layer gives out: ``(samples *
        seqlen, vocabulary)``."""
        with self.autocast():
            residual = states[..., : self.source.spec.hidden]
            found = nn.functional.linear(self._norm(residual), self._head)
        return self.source.spec.capped(found).flatten(0, 1)


Run = Callable[[int, LayerTensors, torch.Tensor], torch.Tensor]
"""What a decoder layer, by index and tensors, makes of hidden states."""


@torch.no_grad()
def way_there(
    source: SourceModel, hidden: torch.Tensor, run: Run, at_once: int
) -> list[torch.Tensor]:
    """What each layer reads, beginning with ``hidden``, and what the last one gives out; with
    ``at_once`` samples run together."""
    read = [hidden]
    for index, layer in source.layers():
        parts = read[-1].split(at_once)
        read.append(torch.cat([run(index, layer, part) for part in parts]))
    return read


def way_back(
    source: SourceModel,
    read: list[torch.Tensor],
    run: Run,
    gradient: torch.Tensor,
    at_once: int,
) -> Iterator[torch.Tensor]:
    """The gradient in what each layer gives out, from the last one on, then in what the first one
    reads. A layer's graph is made anew, so only one is held (Chen et al., arXiv 1604.06174).

    Args:
        read: of each layer, from which they are taken.
        gradient: in what the last one gives out.
        at_once: samples whose graph is held.
    """
    yield gradient
    for index, layer in source.layers(range(len(read))[::-1]):
        hidden = read.pop().requires_grad_()
        for part, own in zip(hidden.split(at_once), gradient.split(at_once), strict=True):
            run(index, layer, part).backward(own)
        assert hidden.grad is not None
        gradient = hidden.grad
        yield gradient


class FoldedDecoder(Decoder):
    """A decoder with learned folds. Inputs are quantized, weights are not.

    Args:
        source: the original model.
        schema: bits and clips of every linear's input.
    """

    def __init__(self, source: SourceModel, schema: QuantizationSchema) -> None:
        super().__init__(source)
        self._schema = schema

    def embedded(self, tokens: torch.Tensor, transform: ModelTransform) -> torch.Tensor:
        """What the first layer reads of int64 ``tokens (samples, seqlen)``: float32 ``(samples,
        seqlen, spec.stream)``."""
        return transform.embedding(self.source.embed(tokens))

    def folded_layer(
        self, index: int, tensors: LayerTensors, hidden: torch.Tensor, folded: Folded
    ) -> torch.Tensor:
        """:meth:`layer` of the source's ``tensors``, with folds that have a gradient in them, or
        not."""
        weights = {name: tensor.float() for name, tensor in tensors.items()}
        with self.autocast():
            folded.transform.layer(index, weights, folded.scales[index])
        return self.layer(index, weights, hidden, self._quantizers(index))

    def folded_logits(self, states: torch.Tensor, transform: ModelTransform) -> torch.Tensor:
        """:meth:`logits`, from where a transform has them."""
        # The norm's weight is in the original's basis.
        if isinstance(transform.residual, DenseRotation):
            states = DenseRotation(transform.residual.blocks.mT).rotate(states)
        return self.logits(states)

    def _quantizers(self, index: int) -> dict[str, InputMap]:
        spec = self.source.spec
        quantized = QuantizedInputs(torch.float32)
        prefix, maps = spec.layer_prefix(index), dict[str, InputMap]()
        for linear in spec.layer_table(index).linears:
            scheme = self._schema.scheme(prefix + linear)
            rotation = self._schema.online.rotation(prefix + linear)
            block = 0 if rotation is None else rotation.block
            if scheme is not None:
                maps[linear] = _dequantized(quantized, scheme.activations, block)
        return maps


def _dequantized(quantized: QuantizedInputs, scheme: ActivationScheme, block: int) -> InputMap:
    def values(x: torch.Tensor) -> torch.Tensor:
        codes, scale = quantized(x, scheme, block)
        return (codes * scale).view(x.shape)

    return values
