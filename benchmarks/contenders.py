# SPDX-License-Identifier: Apache-2.0
"""What kernels.py times, and what it needs to know of the device: the same for CPUs and GPUs."""

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from common import Floors, Timing

from smoothrot_vllm import ops

SCHEMES = {"w4a8": (4, 8, -1), "w4a4": (4, 4, -1), "w4a8_g128": (4, 8, 128), "w8a8": (8, 8, -1)}
"""Bits of weights and activations, and group size, -1 for one scale per output."""
CLIP = 0.9


class Rotating:
    """Calls a layer with one weight after the other, round and round.

    Args:
        layer: of an input ``(tokens, inputs)`` and a weight.
        weights: more of them than the last-level cache holds, because a served model never finds a layer's weights there.
        dtype: of the input.
    """

    def __init__(
        self, layer: Callable[[torch.Tensor, Any], torch.Tensor], weights: Iterable[Any], dtype: torch.dtype = torch.bfloat16
    ) -> None:
        listed = list(weights)
        self.layer, self.listed, self.copies, self.dtype = layer, listed, len(listed), dtype
        self.weights = itertools.cycle(listed)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """The layer's output with the next weight."""
        return self.layer(x, next(self.weights))


Maker = Callable[[int, int, int], Rotating]
"""Of outputs, inputs and how many int4 weights are more than the cache holds: a layer on random weights."""


@dataclass
class Peers:
    """Makers by name, and why others are not among them."""

    makers: dict[str, Maker] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)

    def find(self, name: str, discover: Callable[[], Maker]) -> None:
        """Add a peer, or remember why it cannot be had: ``discover`` raises ImportError or RuntimeError with the reason."""
        try:
            self.makers[name] = discover()
        except (ImportError, RuntimeError) as error:
            self.missing[name] = str(error)

    def build(self, outputs: int, inputs: int, copies: int) -> dict[str, Rotating]:
        """The peers' layers of one shape; one that fails is noted and left out, because its code is not ours to fix."""
        built = {}
        for name, maker in self.makers.items():
            try:
                built[name] = maker(outputs, inputs, copies)
            except Exception as error:
                self.note(name, f"{outputs} x {inputs}", error)
        return built

    def call_once(self, layers: Mapping[str, Rotating], x: torch.Tensor) -> set[str]:
        """Names of the peers among ``layers`` that can take ``x``; the others are noted."""
        working = set()
        for name in self.makers.keys() & layers.keys():
            try:
                layers[name](x.to(layers[name].dtype))
                working.add(name)
            except Exception as error:
                self.note(name, f"{x.shape[0]} tokens of {x.shape[1]} inputs", error)
        return working

    def note(self, name: str, where: str, error: Exception) -> None:
        """Remember that a peer failed."""
        first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
        self.missing[f"{name}, {where}"] = first_line


class Device(Protocol):
    """Where kernels are timed."""

    name: str
    peers: Peers
    cache_bytes: int
    """Weights of a layer rotate through this many bytes."""
    activation_bytes: int
    """Of an activation that the floor counts; 0 where activations stay in cache."""

    def facts(self) -> dict[str, Any]:
        """What the report says of the device."""

    def floors(self) -> Floors:
        """What it reaches without doing our work."""

    def reader(self, memory: Sequence[torch.Tensor]) -> Callable[[], object] | None:
        """A call that only reads tensors of bytes, to be timed beside each layer; None where the bandwidth does not change."""

    def time(self, calls: Mapping[str, tuple[Callable[[], object], int]], rounds: int, seconds: float) -> dict[str, Timing]:
        """Time one call of each contender; the number beside it is that of calls after which it repeats itself."""


def ours(columns: int, inputs: int, scheme: str, copies: int) -> Rotating:
    """``ops.linear`` of a scheme on random codes, over ``copies`` weights."""
    weight_bits, act_bits, group = SCHEMES[scheme]
    scale = torch.rand(columns, 1 if group == -1 or inputs % group else inputs // group)
    if weight_bits == 4:
        weight = torch.randint(0, 256, (columns, inputs // 2), dtype=torch.uint8)
    else:
        weight = torch.randint(-128, 128, (columns, inputs), dtype=torch.int8)
    return Rotating(
        lambda x, packed: ops.linear(x, packed, scale, None, 0, CLIP, act_bits, weight_bits),
        [ops.prepack_weight(weight, scale, weight_bits) for _ in range(copies)],
    )


def torch_linear(columns: int, inputs: int, copies: int, dtype: torch.dtype = torch.bfloat16) -> Rotating:
    """``torch.nn.functional.linear`` in a 16-bit dtype."""
    weight = torch.randn(columns, inputs, dtype=dtype)
    return Rotating(torch.nn.functional.linear, [weight.clone() for _ in range(max(2, copies // 4))], dtype)


def floor_seconds(tokens: int, columns: int, inputs: int, scheme: str, floors: Floors, activation_bytes: int = 0) -> float:
    """The longer of moving weights, inputs and outputs once and multiplying at the peak rate.

    Args:
        tokens, columns, inputs: of the layer.
        scheme: one of :data:`SCHEMES`.
        floors: of the device.
        activation_bytes: of each input and output value; 0 counts the weights alone.
    """
    weight_bits, act_bits, _ = SCHEMES[scheme]
    moved = columns * inputs * weight_bits / 8 + tokens * (columns + inputs) * activation_bytes
    both_int4 = weight_bits == act_bits == 4
    rate = floors.int4_multiply_adds if both_int4 and floors.int4_multiply_adds else floors.multiply_adds
    multiply = tokens * columns * inputs / rate if rate else 0.0
    return max(moved / floors.read_bytes, multiply)
