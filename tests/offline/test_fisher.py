# SPDX-License-Identifier: Apache-2.0
"""What a layer's error costs the whole model is estimated without bias."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from smoothrot_offline.distill.divergence import divergence
from smoothrot_offline.learn import decoder, fisher
from smoothrot_offline.learn.decoder import Decoder
from smoothrot_offline.source.checkpoint import open_checkpoint
from smoothrot_offline.source.layers import SourceModel
from smoothrot_offline.source.resolve import resolve

TOKENS = torch.arange(10)[None] * 7 % 96
TOKEN = 4
DRAWS = 100


@pytest.mark.parametrize(("family", "changed"), [("llama", 0), ("gemma3", 2), ("gemma4", 1)])
def test_the_cost_of_a_small_change_is_its_divergence(
    make_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, family: str, changed: int
) -> None:
    monkeypatch.setattr(decoder, "product_dtype", lambda _: torch.float32)
    checkpoint = open_checkpoint(make_model(family))
    source = SourceModel(checkpoint, resolve(checkpoint.config))
    model = Decoder(source)
    generator = torch.Generator().manual_seed(0)

    @torch.no_grad()
    def logits(change: torch.Tensor | None) -> torch.Tensor:
        hidden = source.embed(TOKENS)
        for index, layer in source.layers():
            hidden = model.layer(index, layer, hidden, {})
            if index == changed and change is not None:
                hidden[0, TOKEN] += change
        return model.logits(hidden)

    # Of keys and values that later layers share too.
    change = torch.randn(source.spec.stream, generator=generator)
    change *= 0.02 * logits(None).norm() / change.norm()
    exact = divergence(logits(change), logits(None)) * TOKENS.numel()

    def estimate(seed: int) -> float:
        gradients = fisher.output_gradients(source, TOKENS, seed)
        return float(gradients[changed][0, TOKEN] @ change) ** 2 / 2

    mean = sum(map(estimate, range(DRAWS))) / DRAWS
    # Of the square of a normal number the mean of so many is 14 % from its own.
    assert mean == pytest.approx(float(exact), rel=0.35)
