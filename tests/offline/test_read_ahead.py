# SPDX-License-Identifier: Apache-2.0
"""Layers are read one ahead of the work on them."""

import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.support.random_models import make_model
from smoothrot_offline.source.checkpoint import Checkpoint, open_checkpoint
from smoothrot_offline.source.layers import SourceModel
from smoothrot_offline.source.resolve import resolve
from smoothrot_vllm.errors import CheckpointError

LAYERS = 4
SHAPE = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 8,
    "vocab_size": 64,
}


@pytest.fixture
def source(tmp_path: Path) -> SourceModel:
    checkpoint = open_checkpoint(make_model(tmp_path / "source", SHAPE, random=True))
    return SourceModel(checkpoint, resolve(checkpoint.config))


@pytest.fixture
def begun(monkeypatch: pytest.MonkeyPatch) -> list[threading.Event]:
    """By layer, whether its reading has begun; that of layer 2 fails."""
    events = [threading.Event() for _ in range(LAYERS)]
    read = Checkpoint.load_relative

    def watched(self: Checkpoint, prefix: str, names: Iterable[str]) -> dict[str, Any]:
        index = int(prefix.split(".")[2])
        events[index].set()
        if index == 2:
            raise CheckpointError("layer 2 is damaged")
        return read(self, prefix, names)

    monkeypatch.setattr(Checkpoint, "load_relative", watched)
    return events


@pytest.mark.parametrize("indices", [range(LAYERS), range(2, LAYERS), range(0)])
def test_every_layer_is_given_in_order(source: SourceModel, indices: range) -> None:
    found = list(source.layers(indices))
    assert [index for index, _ in found] == list(indices)
    for index, layer in found:
        expected = source.layer(index)
        assert layer.keys() == expected.keys()
        assert all(torch.equal(layer[name], expected[name]) for name in expected)


def test_the_next_layer_is_read_while_one_is_worked_on_and_no_other(
    source: SourceModel, begun: list[threading.Event]
) -> None:
    layers = source.layers()
    next(layers)
    assert begun[1].wait(timeout=30)
    assert not begun[2].is_set()
    layers.close()


def test_a_damaged_layer_is_an_error_when_its_turn_comes(
    source: SourceModel, begun: list[threading.Event]
) -> None:
    layers = source.layers()
    next(layers)
    next(layers)
    assert begun[2].wait(timeout=30)
    with pytest.raises(CheckpointError, match="layer 2 is damaged"):
        next(layers)
