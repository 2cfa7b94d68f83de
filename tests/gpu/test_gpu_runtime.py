# SPDX-License-Identifier: Apache-2.0
"""What only a GPU has: CUDA graphs, streams and a second device."""

from typing import Any

import pytest
import torch
from ops_contract import CLIP, Layer, Target, assert_same

from benchmarks.support.cuda_graphs import capture
from smoothrot_vllm import ops, reference

SCHEMES = [(-1, 4, 4), (-1, 4, 8), (-1, 8, 8), (64, 4, 4), (64, 4, 8)]
"""Inputs of a group, bits of weights, bits of activations."""
TOKENS = [1, 17, 129, 300]
OUTPUTS, INPUTS, BLOCK = 1024, 1536, 1536
SLEEP_CYCLES = 200_000_000


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def layer_of(target: Target, scheme: tuple[int, int, int]) -> Layer:
    return target.layer(OUTPUTS, INPUTS, *scheme, torch.float16)


def inputs_of(target: Target, tokens: int) -> torch.Tensor:
    return target.randn(tokens, INPUTS, dtype=torch.float16)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("tokens", TOKENS)
def test_a_captured_graph_replays_on_new_inputs(
    target: Target, tokens: int, scheme: tuple[int, int, int]
) -> None:
    layer = layer_of(target, scheme)
    packed = target.ops.prepack_weight(*layer.weight, layer.weight_bits)
    static = inputs_of(target, tokens)
    target.prepare(BLOCK)

    def call() -> torch.Tensor:
        return target.ops.linear(
            static, packed, layer.scale, layer.bias, BLOCK, CLIP, *layer.numbers
        )

    results: list[torch.Tensor] = []
    graph = capture(lambda: results.append(call()), 1)
    for _ in range(3):
        x = inputs_of(target, tokens)
        static.copy_(x)
        graph.replay()
        assert_same(results[-1], layer.expected(x, BLOCK))


def test_a_captured_graph_routes_new_tokens_to_other_experts(target: Target) -> None:
    """Nothing of the op waits for the device or depends on which experts have tokens."""
    shape = (33, 2, 8, 512, 768, 4, torch.bfloat16)
    numbers = (target.prepare(256), CLIP, 8, 4)
    given, gate_up, down = target.experts(*shape)
    static = [part.clone() for part in given]
    packed = target.packed_experts((gate_up, down), 4)
    arguments: list[Any] = [*static, *packed, *numbers, -1]
    results: list[torch.Tensor] = []
    graph = capture(lambda: results.append(ops.experts(*arguments)), 1)
    for _ in range(3):
        (x, weights, chosen), *_ = target.experts(*shape)
        for old, new in zip(static, (x, weights, chosen), strict=True):
            old.copy_(new)
        graph.replay()
        assert_same(results[-1], reference.experts(x, weights, chosen, gate_up, down, *numbers))


def test_kernels_run_on_the_current_stream(target: Target) -> None:
    """The stream sleeps before it writes the input: a kernel on any other stream would read the
    old one."""
    layer = layer_of(target, (-1, 4, 8))
    for tokens in TOKENS:
        new = inputs_of(target, tokens)
        static = torch.zeros_like(new)
        torch.cuda.synchronize()
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            torch.cuda._sleep(SLEEP_CYCLES)
            static.copy_(new)
            y = target.linear(layer, static)
        stream.synchronize()
        assert_same(y, layer.expected(new))


def test_streams_do_not_disturb_each_other(target: Target) -> None:
    layers = [layer_of(target, scheme) for scheme in SCHEMES]
    inputs = [inputs_of(target, 33) for _ in layers]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in layers]
    results: list[torch.Tensor] = []
    for _ in range(20):
        for stream, layer, x in zip(streams, layers, inputs, strict=True):
            with torch.cuda.stream(stream):
                results.append(target.linear(layer, x, BLOCK))
    torch.cuda.synchronize()
    expected = [layer.expected(x, BLOCK) for layer, x in zip(layers, inputs, strict=True)]
    for i, y in enumerate(results):
        assert_same(y, expected[i % len(layers)])


def test_the_device_of_the_tensors_is_used(target: Target) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs, one is here")
    second = torch.device("cuda", 1)
    other = Target(
        target.ops, second, target.elsewhere, lambda block: ops.prepare_rotation(block, second)
    )
    layer, x = layer_of(other, (-1, 4, 8)), inputs_of(other, 17)
    with torch.cuda.device(0):
        y = other.linear(layer, x, BLOCK)
        assert torch.cuda.current_device() == 0
    assert y.device == second
    assert_same(y, layer.expected(x, BLOCK))


def test_a_tensor_of_another_device_is_refused(target: Target) -> None:
    layer = layer_of(target, (-1, 4, 8))
    with pytest.raises(RuntimeError, match=r"smoothrot::linear: packed: .* not on cuda:\d"):
        target.ops.linear(
            inputs_of(target, 1), layer.stored.cpu(), layer.scale, None, 0, CLIP, 8, 4, -1
        )
