# SPDX-License-Identifier: Apache-2.0
"""The contenders of decode.py: random weights of one model in bfloat16, in fp8, and in the
schemes of our presets."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F

from benchmarks.kernels.decode_model import LayerLinears, Linear, Pieces, quantize_rows
from benchmarks.kernels.schemes import preset_schema
from benchmarks.support.random_weights import RandomWeight
from smoothrot_offline.source.family import ModelSpec
from smoothrot_vllm import ops
from smoothrot_vllm.format import LinearScheme, QuantizationSchema
from smoothrot_vllm.hadamard import base_matrix, factorize
from smoothrot_vllm.reference import hadamard_transform

OURS = {f"{preset}_w4a{bits}": (preset, bits) for bits in (8, 4) for preset in ("balanced", "best")}
"""Preset and bits of the activations by contender."""
CONTENDERS = ("bf16", "balanced_w4a8", "fp8", "balanced_w4a4", "best_w4a8", "best_w4a4")


@dataclass(frozen=True)
class Linears:
    """All linears of a model, and the bytes of their weights that a step reads; ``tied`` is the
    embedding of a tied head."""

    layers: list[LayerLinears]
    head: Linear
    weight_bytes: int
    tied: torch.Tensor | None = None


class Weight(Protocol):
    """The weight of one linear."""

    @property
    def nbytes(self) -> int:
        """That a call reads."""

    def linear(self, x: torch.Tensor) -> torch.Tensor:
        """Of ``(batch, inputs)``."""

    def silu_mul_linear(self, gate_up: torch.Tensor) -> torch.Tensor:
        """Of ``(batch, 2 inputs)``, gate before up."""


def shapes(spec: ModelSpec) -> dict[str, tuple[int, int]]:
    """``(outputs, inputs)`` of a layer's linears as vLLM fuses them, by the first one that is
    stored."""
    rows = (spec.heads + 2 * spec.kv_heads) * spec.head_dim
    return {
        "self_attn.q_proj": (rows, spec.hidden),
        "self_attn.o_proj": (spec.hidden, spec.heads * spec.head_dim),
        "mlp.gate_proj": (2 * spec.intermediate, spec.hidden),
        "mlp.down_proj": (spec.hidden, spec.intermediate),
    }


def assemble(
    weights: Iterator[Weight], spec: ModelSpec, tied: torch.Tensor | None = None
) -> Linears:
    """Linears of weights that come in the order of :func:`shapes`, layer by layer, and the
    head's at last."""
    layers, nbytes = [], 0
    for _ in range(spec.layers):
        qkv, o, gate_up, down = (next(weights) for _ in range(4))
        nbytes += sum(weight.nbytes for weight in (qkv, o, gate_up, down))
        layers.append(LayerLinears(qkv.linear, o.linear, gate_up.linear, down.silu_mul_linear))
    head = next(weights)
    return Linears(layers, head.linear, nbytes + head.nbytes, tied)


@dataclass(frozen=True)
class Bf16Weight:
    """``(outputs, inputs)`` in bfloat16."""

    values: torch.Tensor
    pieces: Pieces

    @property
    def nbytes(self) -> int:
        """That a call reads."""
        return self.values.nbytes

    def linear(self, x: torch.Tensor) -> torch.Tensor:
        """torch's own."""
        return F.linear(x, self.values)

    def silu_mul_linear(self, gate_up: torch.Tensor) -> torch.Tensor:
        """torch's own."""
        return F.linear(self.pieces.silu_mul(gate_up), self.values)


class Fp8Weight:
    """fp8 with one scale per output, and dynamically quantized inputs with one per token.

    Args:
        values: ``(outputs, inputs)``.
        pieces: has the quantizer of inputs.
    """

    def __init__(self, values: torch.Tensor, pieces: Pieces) -> None:
        self.pieces = pieces
        self.codes, scale = quantize_rows(values)
        self.scale = scale.t().contiguous()
        self.nbytes = self.codes.nbytes + self.scale.nbytes

    def linear(self, x: torch.Tensor) -> torch.Tensor:
        """``torch._scaled_mm`` row by row."""
        codes, scale = self.pieces.quantize_rows(x)
        out = torch._scaled_mm(
            codes, self.codes.t(), scale, self.scale, out_dtype=x.dtype, use_fast_accum=True
        )
        assert isinstance(out, torch.Tensor)
        return out

    def silu_mul_linear(self, gate_up: torch.Tensor) -> torch.Tensor:
        """The same of the activation."""
        return self.linear(self.pieces.silu_mul(gate_up))


@dataclass(frozen=True)
class StoredWeight:
    """A linear as a checkpoint stores it, and its input's online rotation."""

    weight: RandomWeight
    scheme: LinearScheme
    block: int = 0

    @classmethod
    def random(
        cls, outputs: int, inputs: int, scheme: LinearScheme, block: int = 0
    ) -> "StoredWeight":
        """See :meth:`RandomWeight.of`."""
        return cls(RandomWeight.of(outputs, inputs, scheme.weights), scheme, block)

    def dequantized(self) -> torch.Tensor:
        """``(outputs, inputs)`` in bfloat16: what a linear without rotation must multiply by to
        give the same."""
        values = self.weight.dequantized()
        return (unrotated(values, self.block) if self.block else values).bfloat16()


def unrotated(weight: torch.Tensor, block: int) -> torch.Tensor:
    """``weight (I (x) H_block)^T``, orthonormal: base matrices are not symmetric, so this is not
    the rotation itself."""
    factors = factorize(block)
    assert factors is not None
    runs = hadamard_transform(weight, factors.power).view(-1, factors.base, factors.power)
    base = base_matrix(factors.base).to(runs)
    return (base @ runs / math.sqrt(block)).reshape(weight.shape)


class OurWeight:
    """A stored weight as the plugin holds it and calls it (smoothrot_vllm/plugin/linear.py)."""

    def __init__(self, stored: StoredWeight) -> None:
        weights, activations = stored.scheme.weights, stored.scheme.activations
        self.packed, self.scale = stored.weight.packed(), stored.weight.scale
        self.numbers = (
            stored.block,
            activations.clip,
            activations.bits,
            weights.bits,
            weights.group_size,
        )
        if stored.block:
            ops.prepare_rotation(stored.block, self.scale.device)
        # On a CPU the packed codes hold the scales as well.
        self.nbytes = self.packed.nbytes + (self.scale.nbytes if self.scale.is_cuda else 0)

    def linear(self, x: torch.Tensor) -> torch.Tensor:
        """The op of the plugin."""
        return ops.linear(x, self.packed, self.scale, None, *self.numbers)

    def silu_mul_linear(self, gate_up: torch.Tensor) -> torch.Tensor:
        """The op that the plugin puts in place of activation and down_proj."""
        return ops.silu_mul_linear(gate_up, self.packed, self.scale, None, *self.numbers)


def stored_weights(spec: ModelSpec, schema: QuantizationSchema) -> Iterator[StoredWeight]:
    """Random weights of a model in the schemes of its checkpoint, in the order that
    :func:`assemble` takes."""
    for index in range(spec.layers):
        for name, (outputs, inputs) in shapes(spec).items():
            scheme, rotation = (
                schema.scheme(spec.layer_prefix(index) + name),
                schema.online.rotation(name),
            )
            assert scheme is not None
            yield StoredWeight.random(
                outputs, inputs, scheme, 0 if rotation is None else rotation.block
            )
    assert schema.lm_head is not None
    yield StoredWeight.random(spec.vocab, spec.hidden, schema.lm_head)


def _random(outputs: int, inputs: int) -> torch.Tensor:
    return torch.randn(outputs, inputs, dtype=torch.bfloat16) / math.sqrt(inputs)


def make(name: str, spec: ModelSpec, pieces: Pieces) -> Linears:
    """The linears of one of :data:`CONTENDERS`. The head of a peer stays in bfloat16, as vLLM
    leaves it; a tied one is the embedding."""
    if name in OURS:
        schema = preset_schema(spec, *OURS[name])
        return assemble(map(OurWeight, stored_weights(spec, schema)), spec)
    kinds: dict[str, Callable[[torch.Tensor, Pieces], Weight]]
    kinds = {"bf16": Bf16Weight, "fp8": Fp8Weight}
    head = _random(spec.vocab, spec.hidden)

    def weights() -> Iterator[Weight]:
        for _ in range(spec.layers):
            yield from (kinds[name](_random(*shape), pieces) for shape in shapes(spec).values())
        yield Bf16Weight(head, pieces)

    return assemble(weights(), spec, head if spec.tied else None)
