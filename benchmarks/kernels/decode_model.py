# SPDX-License-Identifier: Apache-2.0
"""One decode step of a Llama in plain torch, for decode.py: every contender runs the same code
around its own linears."""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any, Self

import torch
import torch.nn.functional as F

from smoothrot_offline.source.family import ModelSpec

FP8 = torch.float8_e4m3fn
FP8_MAX = torch.finfo(FP8).max
EPSILON = 1e-5

Linear = Callable[[torch.Tensor], torch.Tensor]


def add_rms_norm(
    x: torch.Tensor, delta: torch.Tensor, weight: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """``x + delta``, and its RMS norm."""
    total = x + delta
    return total, F.rms_norm(total, weight.shape, weight, EPSILON)


def rotary(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Heads ``(batch, heads, head_dim)`` turned by the angles of one position, ``(head_dim,)``."""
    left, right = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-right, left), dim=-1) * sin


def silu_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """``silu(gate) * up`` of ``(batch, 2 K)``, gate before up."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def quantize_rows(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """fp8 codes and scales ``(rows, 1)``, one per row."""
    scale = x.abs().amax(dim=-1, keepdim=True).float().clamp(min=1e-12) / FP8_MAX
    return (x.float() / scale).clamp(-FP8_MAX, FP8_MAX).to(FP8), scale


@dataclass(frozen=True)
class Pieces:
    """What lies between the linears, as functions that torch may have fused."""

    add_rms_norm: Callable[
        [torch.Tensor, torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]
    ] = add_rms_norm
    rotary: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor] = rotary
    silu_mul: Linear = silu_mul
    quantize_rows: Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]] = quantize_rows

    @classmethod
    def compiled(cls) -> Self:
        """Each compiled by torch for the shapes that it meets, as vLLM does with all that is no
        linear or attention.

        Raises:
            Exception: whatever torch.compile raises where its compiler is missing.
        """
        pieces = cls()
        # A whole graph or an error: torch would otherwise run shapes beyond its limit of
        # compilations uncompiled.
        options: dict[str, Any] = {"dynamic": False, "fullgraph": True}
        pieces = replace(
            pieces,
            **{f.name: torch.compile(getattr(pieces, f.name), **options) for f in fields(cls)},
        )
        pieces.silu_mul(torch.zeros(16, 64, dtype=torch.bfloat16))
        return pieces


@dataclass(frozen=True)
class LayerLinears:
    """The linears of a decoder layer. ``down`` takes gate and up, to which it applies
    ``silu_mul`` itself."""

    qkv: Linear
    o: Linear
    gate_up: Linear
    down: Linear


@dataclass(frozen=True)
class State:
    """What a step reads beside the linears: embedding, keys and values, and the tokens of which
    it computes the next."""

    embedding: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor
    tokens: torch.Tensor

    @classmethod
    def random(
        cls, spec: ModelSpec, batch: int, context: int, embedding: torch.Tensor | None = None
    ) -> Self:
        """A context of random keys and values; ``embedding`` is that of a tied head."""
        if embedding is None:
            embedding = torch.randn(spec.vocab, spec.hidden, dtype=torch.bfloat16)
        cache = spec.layers, batch, spec.kv_heads, context, spec.head_dim
        keys, values = (torch.randn(cache, dtype=torch.bfloat16) for _ in range(2))
        return cls(embedding, keys, values, torch.randint(spec.vocab, (batch,)))

    @property
    def cache_bytes(self) -> int:
        """Of keys and values."""
        return self.keys.nbytes + self.values.nbytes


class Llama:
    """A decoder whose last position is computed anew at each step.

    Args:
        spec: sizes.
        layers: linears of each layer.
        head: from the normed hidden state to logits.
        state: of a batch; the last position of keys and values is overwritten by a step, and the
            tokens by the next ones.
        pieces: what lies between the linears.
    """

    def __init__(
        self,
        spec: ModelSpec,
        layers: list[LayerLinears],
        head: Linear,
        state: State,
        pieces: Pieces,
    ) -> None:
        self.spec, self.layers, self.head, self.state, self.pieces = (
            spec,
            layers,
            head,
            state,
            pieces,
        )
        self.norm = torch.ones(spec.hidden, dtype=torch.bfloat16)
        half = spec.head_dim // 2
        angles = (state.keys.shape[-2] - 1) / 500000.0 ** (
            torch.arange(half, dtype=torch.float32) / half
        )
        self.cos, self.sin = (f(angles).repeat(2).bfloat16() for f in (torch.cos, torch.sin))

    def logits(self) -> torch.Tensor:
        """``(batch, vocab)`` of the state's tokens at its last position."""
        x = F.embedding(self.state.tokens, self.state.embedding)
        delta = torch.zeros_like(x)
        for index, layer in enumerate(self.layers):
            x, normed = self.pieces.add_rms_norm(x, delta, self.norm)
            delta = layer.o(self._attend(index, layer.qkv(normed)))
            x, normed = self.pieces.add_rms_norm(x, delta, self.norm)
            delta = layer.down(layer.gate_up(normed))
        return self.head(self.pieces.add_rms_norm(x, delta, self.norm)[1])

    def step(self) -> None:
        """Compute the likeliest next tokens and make them the state's."""
        self.state.tokens.copy_(self.logits().argmax(dim=-1))

    def _attend(self, index: int, qkv: torch.Tensor) -> torch.Tensor:
        spec, batch = self.spec, qkv.shape[0]
        heads = qkv.view(batch, -1, spec.head_dim)
        turned = self.pieces.rotary(heads[:, : spec.heads + spec.kv_heads], self.cos, self.sin)
        query, key = turned.split((spec.heads, spec.kv_heads), dim=1)
        keys, values = self.state.keys[index], self.state.values[index]
        keys[:, :, -1] = key
        values[:, :, -1] = heads[:, spec.heads + spec.kv_heads :]
        out = F.scaled_dot_product_attention(query[:, :, None], keys, values, enable_gqa=True)
        return out.reshape(batch, -1)
