# SPDX-License-Identifier: Apache-2.0
"""vLLM loads weights again layer by layer: it counts what arrives, has the layer repacked and
copies the result to where compiled graphs look."""

from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from configs import make_config
from linears import HIDDEN, INTERMEDIATE, SCHEMES, VOCAB, Stored, down, finish, tokens
from vllm.config import ModelConfig, VllmConfig
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.model_executor.model_loader.reload import (
    finalize_layerwise_reload,
    initialize_layerwise_reload,
    record_metadata_for_reloading,
)

from smoothrot_vllm.errors import CheckpointError
from smoothrot_vllm.format import WEIGHT_GROUP_SCALE

MODEL = cast(ModelConfig, SimpleNamespace(dtype=torch.float32))


def build(kind: str, weights: dict[str, int]) -> tuple[Any, int, int]:
    """A layer, its rows and its inputs."""
    if kind == "down_proj":
        return down(make_config(weights=weights)), HIDDEN, INTERMEDIATE
    config = make_config(lm_head={"weights": weights, "activations": {"bits": 8}})
    return ParallelLMHead(VOCAB, HIDDEN, quant_config=config, prefix="lm_head"), VOCAB, HIDDEN


@pytest.mark.parametrize("weights", SCHEMES.values(), ids=list(SCHEMES))
@pytest.mark.parametrize("kind", ["down_proj", "lm_head"])
def test_weights_loaded_again_take_the_place_of_the_first(
    vllm_config: VllmConfig, kind: str, weights: dict[str, int]
) -> None:
    layer, rows, inputs = build(kind, weights)
    other, _, _ = build(kind, weights)
    first, second = (Stored.random(rows, inputs, weights, seed) for seed in (1, 2))
    record_metadata_for_reloading(layer)
    first.load_into(layer)
    finish(layer)
    second.load_into(other)
    finish(other)
    x = tokens(inputs)
    wanted = other.quant_method.apply(other, x)
    assert not torch.equal(layer.quant_method.apply(layer, x), wanted)
    before = {name: parameter.data_ptr() for name, parameter in layer.named_parameters()}
    for _ in range(2):
        initialize_layerwise_reload(layer)
        second.load_into(layer)
        finalize_layerwise_reload(layer, MODEL)
        assert torch.equal(layer.quant_method.apply(layer, x), wanted)
        after = {name: parameter.data_ptr() for name, parameter in layer.named_parameters()}
        assert after == before


def test_group_scales_that_are_not_loaded_again_are_missed(vllm_config: VllmConfig) -> None:
    weights = SCHEMES["w4 in groups of 32"]
    layer, rows, inputs = build("down_proj", weights)
    stored = Stored.random(rows, inputs, weights, 1)
    record_metadata_for_reloading(layer)
    stored.load_into(layer)
    finish(layer)
    initialize_layerwise_reload(layer)
    for name, tensor in stored.tensors().items():
        if name != WEIGHT_GROUP_SCALE:
            parameter = layer.get_parameter(name)
            parameter.weight_loader(parameter, tensor)
    with pytest.raises(CheckpointError, match=r"none named .*weight_group_scale \(1 missing\)"):
        finalize_layerwise_reload(layer, MODEL)
