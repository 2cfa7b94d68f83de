# SPDX-License-Identifier: Apache-2.0
"""What an error in a layer's output costs the whole model."""

import torch

from smoothrot_offline.learn.decoder import Decoder, way_back, way_there
from smoothrot_offline.source.family import ModelSpec
from smoothrot_offline.source.layers import LayerTensors, SourceModel


def output_gradients(source: SourceModel, tokens: torch.Tensor, seed: int) -> list[torch.Tensor]:
    """Gradients of ``log p`` of next tokens that are drawn from the model's own predictions.

    For a small change ``e`` of what a layer gives out at a token, ``(g e)^2 / 2`` is an unbiased
    estimate of the ``KL`` it costs there: the mean of ``g g^T`` is Fisher's information.

    Args:
        source: the original model.
        tokens: int64 ``(samples, seqlen)``.
        seed: of the draw.

    Returns:
        For each decoder layer, in what it gives out, float32 ``(samples, seqlen, spec.stream)``.
    """
    decoder = Decoder(source)

    def run(index: int, layer: LayerTensors, hidden: torch.Tensor) -> torch.Tensor:
        return decoder.layer(index, layer, hidden, {})

    read = way_there(source, source.embed(tokens), run, at_once=1)
    states = read.pop().requires_grad_()
    generator = torch.Generator().manual_seed(seed)
    for one in states.split(1):
        log = decoder.logits(one).float().log_softmax(-1)
        drawn = log.detach().exp().cpu().multinomial(1, generator=generator).to(log.device)
        log.gather(-1, drawn).sum().backward()
    assert states.grad is not None
    *found, _ = way_back(source, read, run, states.grad, at_once=1)
    return found[::-1]


def gradients_flop(spec: ModelSpec, seqlen: int) -> float:
    """Floating-point operations of :func:`output_gradients` for each token: forward, and once more
    with the way back, which is twice as long."""
    return 4 * spec.token_flop(seqlen) + 6 * spec.vocab * spec.hidden


def gradients_bytes(spec: ModelSpec, tokens: int, seqlen: int) -> int:
    """Memory of :func:`output_gradients`: its result, and the graph of a layer and a sequence."""
    kept = tokens * spec.stream * (spec.layers + 1)
    graph = 4 * sum(spec.layer_weights()) + seqlen * (24 * spec.hidden + 8 * spec.intermediate)
    return 4 * (kept + graph + 4 * seqlen * spec.vocab)
