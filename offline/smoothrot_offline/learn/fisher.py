# SPDX-License-Identifier: Apache-2.0
"""What an error costs the whole model: in a layer's output, and in a linear's at each token."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from smoothrot_offline.learn.decoder import Decoder, way_back, way_there
from smoothrot_offline.source.family import ModelSpec
from smoothrot_offline.source.layers import LayerTensors, SourceModel

AT_ONCE = 8
"""Sequences whose hidden states, before every layer, are held together."""


@dataclass(frozen=True)
class Gradients:
    """Of ``log p`` of next tokens that are drawn from the model's own predictions.

    For a small change ``e`` of what a layer gives out at a token, ``(g e)^2 / 2`` is an unbiased
    estimate of the ``KL`` it costs there: the mean of ``g g^T`` is Fisher's information.

    ``outputs`` has, for each decoder layer, the gradients in what it gives out, float32 ``(samples,
    seqlen, spec.stream)``. ``weights`` has, for each layer and by the name of a linear in it, how
    much each token counts in that one's rounding, float32 ``(tokens,)``: the root mean square, over
    output channels, of the gradient in what it gives out, over that of all tokens. Its square is
    what an error costs that is as large in each channel (GuidedQuant, arXiv 2505.07004). Linears of
    experts are not among them.
    """

    outputs: list[torch.Tensor]
    weights: list[dict[str, torch.Tensor]]


def gradient_steps(samples: int) -> int:
    """How often :func:`model_gradients` reports progress."""
    return -(-samples // AT_ONCE)


def model_gradients(
    source: SourceModel,
    tokens: torch.Tensor,
    seed: int,
    step: Callable[[str], None],
    outputs: int = 0,
) -> Gradients:
    """Run the original model there and back.

    Args:
        source: the original model.
        tokens: int64 ``(samples, seqlen)``.
        seed: of the draw.
        step: told of every :data:`AT_ONCE` sequences.
        outputs: of how many of the sequences the gradients in the layers' outputs are kept.
    """
    decoder = Decoder(source)
    layers = range(source.spec.layers)
    kept: list[list[torch.Tensor]] = [[] for _ in layers]
    squares: list[dict[str, list[torch.Tensor]]] = [
        {linear: [] for linear in _weighed(source.spec, index)} for index in layers
    ]

    def run(index: int, layer: LayerTensors, hidden: torch.Tensor) -> torch.Tensor:
        if not torch.is_grad_enabled():
            return decoder.layer(index, layer, hidden, {})
        with _squared_gradients(decoder.module(index), squares[index]):
            return decoder.layer(index, layer, hidden, {})

    generator = torch.Generator().manual_seed(seed)
    for first in range(0, len(tokens), AT_ONCE):
        batch = tokens[first : first + AT_ONCE]
        step(f"gradients of the original's predictions, {first + len(batch)} of {len(tokens)}")
        read = way_there(source, source.embed(batch), run, at_once=1)
        states = read.pop().requires_grad_()
        for one in states.split(1):
            log = decoder.logits(one).float().log_softmax(-1)
            drawn = log.detach().exp().cpu().multinomial(1, generator=generator).to(log.device)
            log.gather(-1, drawn).sum().backward()
        assert states.grad is not None
        *found, _ = way_back(source, read, run, states.grad, at_once=1)
        for own, gradient in zip(kept, reversed(found), strict=True):
            own.append(gradient[: max(0, outputs - first)])
    return Gradients(
        [torch.cat(own) for own in kept],
        [{linear: _weights(torch.cat(parts)) for linear, parts in own.items()} for own in squares],
    )


def _weighed(spec: ModelSpec, index: int) -> Iterable[str]:
    """The quantized linears of a layer that read all tokens."""
    table = spec.layer_table(index)
    groups = [*table.attention_groups(), *table.common_groups()]
    return (linear for group in groups for linear in group if linear not in table.unquantized)


@contextmanager
def _squared_gradients(layer: nn.Module, squares: dict[str, list[torch.Tensor]]) -> Iterator[None]:
    """While the context lasts, what the named linears give out carries a hook that adds its
    gradient's square, mean over channels."""

    def hook(parts: list[torch.Tensor]) -> Callable[[nn.Module, object, torch.Tensor], None]:
        def keep(gradient: torch.Tensor) -> None:
            parts.append(gradient.float().square().mean(-1).flatten())

        def watch(_module: nn.Module, _inputs: object, out: torch.Tensor) -> None:
            out.register_hook(keep)

        return watch

    handles = [
        layer.get_submodule(linear).register_forward_hook(hook(parts))
        for linear, parts in squares.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _weights(squares: torch.Tensor) -> torch.Tensor:
    # The root, as a hundredth of the tokens has nearly all of the squares: they alone are too few
    # to round for.
    return (squares / squares.mean().clamp_min(torch.finfo(torch.float32).tiny)).sqrt()


def gradients_flop(spec: ModelSpec, seqlen: int) -> float:
    """Floating-point operations of :func:`model_gradients` for each token: forward, and once more
    with the way back, which is twice as long."""
    return 4 * spec.token_flop(seqlen) + 6 * spec.vocab * spec.hidden


def gradients_bytes(spec: ModelSpec, tokens: int, seqlen: int) -> int:
    """Memory of :func:`model_gradients`: hidden states before every layer, outputs' gradients, the
    graph of a layer and a sequence, and a number for each token and linear."""
    states = 2 * min(tokens, AT_ONCE * seqlen) * spec.stream * (spec.layers + 1)
    graph = 4 * sum(spec.layer_weights()) + seqlen * (24 * spec.hidden + 8 * spec.widest)
    weights = tokens * sum(len([*_weighed(spec, index)]) for index in range(spec.layers))
    return 4 * (states + graph + weights + 4 * seqlen * spec.vocab)
