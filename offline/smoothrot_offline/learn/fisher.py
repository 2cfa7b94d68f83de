# SPDX-License-Identifier: Apache-2.0
"""What an error costs the whole model: in a layer's output, and in a linear's at each token."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from smoothrot_offline import ranks
from smoothrot_offline.learn.decoder import Decoder, way_back, way_there
from smoothrot_offline.source.family import ModelSpec
from smoothrot_offline.source.layers import LayerTensors, SourceModel
from smoothrot_offline.transform.rotation import seed_for

AT_ONCE = 8
"""Sequences whose hidden states, before every layer, are held together."""
MOST_OUTPUTS = 4096
"""Of a linear whose outputs' gradients are related to each other: it takes the square of that, for
all linears at once."""


@dataclass(frozen=True)
class Gradients:
    """Of ``log p`` of next tokens that are drawn from the model's own predictions.

    For a small change ``e`` of what a layer gives out at a token, ``(g e)^2 / 2`` is an unbiased
    estimate of the ``KL`` it costs there: the mean of ``g g^T`` is Fisher's information.

    ``outputs`` has, for each decoder layer, the gradients in what it gives out of this rank's
    sequences, float32 ``(samples, seqlen, spec.stream)``. ``weights`` has, for each layer and by
    the name of a linear in it, how much each token counts in that one's rounding, float32
    ``(tokens,)``: the root mean square, over output channels, of the gradient in what it gives out,
    over that of all tokens. Its square is what an error costs that is as large in each channel
    (GuidedQuant, arXiv 2505.07004). Linears of experts are not among them.

    ``moments`` has, of linears as ``weights`` has them with at most :data:`MOST_OUTPUTS` outputs,
    ``sum_t g_t g_t^T / |g_t|`` of the gradients in what they give out, in units of its mean
    diagonal, float32 ``(out, out)``: what errors of two output channels cost together (YAQA, arXiv
    2505.22988, which has the sum of ``g_t g_t^T``).
    """

    outputs: list[torch.Tensor]
    weights: list[dict[str, torch.Tensor]]
    moments: list[dict[str, torch.Tensor]]


def gradient_steps(samples: int) -> int:
    """How often :func:`model_gradients` reports progress."""
    return -(-samples // (AT_ONCE * ranks.count()))


def model_gradients(
    source: SourceModel,
    tokens: torch.Tensor,
    seed: int,
    step: Callable[[str], None],
    *,
    outputs: int,
    linears: bool,
    moments: bool,
) -> Gradients:
    """Run the original model there and back.

    Args:
        source: the original model.
        tokens: int64 ``(samples, seqlen)``; each rank takes its share.
        seed: of the draws, together with a sequence's number.
        step: told of every :data:`AT_ONCE` sequences.
        outputs: of how many of the sequences, the first ones, the gradients in the layers' outputs
            are kept.
        linears: take weights; they are empty otherwise.
        moments: take them too.
    """
    numbers = ranks.share(torch.arange(len(tokens)))
    tokens, outputs = ranks.share(tokens), len(ranks.share(torch.arange(outputs)))
    decoder = Decoder(source)
    layers = range(source.spec.layers)
    kept: list[list[torch.Tensor]] = [[] for _ in layers]
    seen = [
        {linear: _Seen(moments) for linear in _weighed(source.spec, index) if linears}
        for index in layers
    ]

    def run(index: int, layer: LayerTensors, hidden: torch.Tensor) -> torch.Tensor:
        if not torch.is_grad_enabled():
            return decoder.layer(index, layer, hidden, {})
        with _watched(decoder.module(index), seen[index]):
            return decoder.layer(index, layer, hidden, {})

    for first in range(0, len(tokens), AT_ONCE):
        batch = tokens[first : first + AT_ONCE]
        step(f"gradients of the original's predictions, {first + len(batch)} of {len(tokens)}")
        read = way_there(source, source.embed(batch), run, at_once=1)
        states = read.pop().requires_grad_()
        for number, one in zip(
            numbers[first : first + AT_ONCE].tolist(), states.split(1), strict=True
        ):
            generator = torch.Generator().manual_seed(seed_for(seed, f"next tokens/{number}"))
            log = decoder.logits(one).float().log_softmax(-1)
            drawn = log.detach().exp().cpu().multinomial(1, generator=generator).to(log.device)
            log.gather(-1, drawn).sum().backward()
        assert states.grad is not None
        *found, _ = way_back(source, read, run, states.grad, at_once=1)
        for own, gradient in zip(kept, reversed(found), strict=True):
            own.append(gradient[: max(0, outputs - first)])
    return Gradients(
        [torch.cat(own) for own in kept],
        [{linear: one.weights(tokens) for linear, one in own.items()} for own in seen],
        [
            {linear: moment for linear, one in own.items() if (moment := one.moment()) is not None}
            for own in seen
        ],
    )


def _weighed(spec: ModelSpec, index: int) -> Iterable[str]:
    """The quantized linears of a layer that read all tokens."""
    table = spec.layer_table(index)
    groups = [*table.attention_groups(), *table.common_groups()]
    return (linear for group in groups for linear in group if linear not in table.unquantized)


class _Seen:
    """What is kept of the gradients in what a linear gives out.

    A token counts by the root of its squared gradient: a hundredth of the tokens has nearly all of
    the squares, and they alone are too few to round for.
    """

    def __init__(self, moments: bool) -> None:
        self._most = MOST_OUTPUTS if moments else 0
        self._squares: list[torch.Tensor] = []
        self._moment: torch.Tensor | None = None

    def add(self, gradient: torch.Tensor) -> None:
        """Of tokens ``(..., out)``."""
        tokens = gradient.flatten(0, -2).float()
        squares = tokens.square().mean(-1)
        self._squares.append(squares)
        if tokens.shape[-1] <= self._most:
            product = (tokens / _positive(squares).sqrt()[:, None]).T @ tokens
            self._moment = product if self._moment is None else self._moment.add_(product)

    def weights(self, tokens: torch.Tensor) -> torch.Tensor:
        """See :class:`Gradients`; ``tokens (samples, seqlen)`` are this rank's own."""
        own = torch.cat(self._squares).view(tokens.shape)
        squares = ranks.gathered(own).flatten()
        return (squares / _positive(squares.mean())).sqrt()

    def moment(self) -> torch.Tensor | None:
        """See :class:`Gradients`."""
        if self._moment is None:
            return None
        ranks.add(self._moment)
        return self._moment / _positive(self._moment.diagonal().mean())


def _positive(mean: torch.Tensor) -> torch.Tensor:
    return mean.clamp_min(torch.finfo(torch.float32).tiny)


@contextmanager
def _watched(layer: nn.Module, seen: Mapping[str, _Seen]) -> Iterator[None]:
    """While the context lasts, the gradient in what each named linear gives out is added to what is
    seen of it."""

    def hook(one: _Seen) -> Callable[[nn.Module, object, torch.Tensor], None]:
        def watch(_module: nn.Module, _inputs: object, out: torch.Tensor) -> None:
            out.register_hook(one.add)

        return watch

    handles = [
        layer.get_submodule(linear).register_forward_hook(hook(one)) for linear, one in seen.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def gradients_flop(spec: ModelSpec, seqlen: int, moments: bool) -> float:
    """Floating-point operations of :func:`model_gradients` for each token: forward, and once more
    with the way back, which is twice as long, and moments of linears."""
    passes = 4 * spec.token_flop(seqlen) + 6 * spec.vocab * spec.hidden
    return passes + (2 * _moment_entries(spec) if moments else 0)


def gradients_bytes(spec: ModelSpec, tokens: int, seqlen: int, linears: bool) -> int:
    """Memory of :func:`model_gradients`: hidden states before every layer, outputs' gradients, the
    graph of a layer and a sequence, and of linears a number for each token. Not
    :func:`moments_bytes`, which stay."""
    states = 2 * min(tokens, AT_ONCE * seqlen) * spec.stream * (spec.layers + 1)
    graph = 4 * sum(spec.layer_weights()) + seqlen * (24 * spec.hidden + 8 * spec.widest)
    weighed = sum(len([*_weighed(spec, index)]) for index in range(spec.layers))
    numbers = tokens * weighed if linears else 0
    return 4 * (states + graph + numbers + 4 * seqlen * spec.vocab)


def moments_bytes(spec: ModelSpec) -> int:
    """Of the moments that :func:`model_gradients` gives."""
    return 4 * _moment_entries(spec)


def _moment_entries(spec: ModelSpec) -> int:
    sizes = (
        spec.linear_shape(linear, spec.layer_table(index))[0]
        for index in range(spec.layers)
        for linear in _weighed(spec, index)
    )
    return sum(size**2 for size in sizes if size <= MOST_OUTPUTS)
