# SPDX-License-Identifier: Apache-2.0
"""What a model family must say about itself: where rotations and scales are folded."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Any, Self

from smoothrot_offline.source.parts import (
    DraftHead,
    Experts,
    HeadSizes,
    LatentAttention,
    LinearAttention,
    Multipliers,
)

Shape = tuple[int, ...]

EXPERT = "{e}"
"""Stands for an expert's number in a family's names."""
DENSE, SPARSE = "dense", "sparse"
"""Kinds of layers of a family whose first ones have no experts."""


def sharing(kind: str) -> str:
    """The kind of layers that are as ``kind`` but for keys and values, which are another
    layer's."""
    return f"{kind} with shared keys and values"


@dataclass(frozen=True)
class Architecture:
    """Where the rotations and scales of one model family are folded. Names are relative to a
    decoder layer; those that hold ``{e}`` are of each expert, see :meth:`with_experts`.

    Of a family with layers of several ``kinds`` each kind has a table of its own, for what is named
    relative to a layer: see :meth:`ModelSpec.layer_table`.
    """

    model_type: str
    class_name: str
    linears: Mapping[str, tuple[str, str]]
    """(Output, input) dimension of each linear: a name of :meth:`ModelSpec.dimensions`."""
    biases: Mapping[str, tuple[str, ...]]
    """Linears with a bias, by the configuration flag that says so ("" = always)."""
    readers: Mapping[str, tuple[str, ...]]
    """Linears that read each norm's output: attention's norm first, then the feed-forward's.
    Without ``pre_norms`` they read the residual stream itself, and are named by their module."""
    writers: tuple[str, ...]
    """Linears that add to the residual stream, of a family with ``post_norms`` through one."""
    value: str
    """Produces, in its last rows, the heads that ``output`` consumes; "" where something other than
    a sum over tokens is between the two, which leaves no place for R2."""
    output: str
    up: str
    """Produces, in its last rows, the factor of ``act(gate(x)) * up(x)`` that is linear in x, if
    :attr:`scales_products`."""
    down: str
    """Consumes that product."""
    settings: Mapping[str, tuple[Any, ...]]
    """Values of a configuration key that transformers and the server both compute, the one of a
    key that is not there first."""
    inner: tuple[tuple[str, ...], ...] = ()
    """Linears of attention that read something of its own: groups of those that read the same."""
    same: Mapping[str, str] = field(default_factory=dict)
    """Keys of the server's alone that must say what another says."""
    partial_rotary: bool = False
    """Both rotate a part of each head if told so."""
    proportional_rope: bool = False
    """Both know RoPE by the first of each head's frequencies alone, ``proportional``."""
    scaled_queries: bool = False
    """Queries grow with their position by ``llama_4_scaling_beta`` of the rotary parameters, which
    the server knows as a key of its own."""
    rope_in_windows: bool = False
    """Where some layers have a window, only they have RoPE. transformers takes ``sliding_window``
    for a sign of it, the server such a layer."""
    rotary_sections: bool = False
    """Both rotate sections of each head by the coordinates of an image. Those of a text's token are
    all its number, so that they change nothing."""
    one_window: bool = False
    """The server has the same window in all layers."""
    head_dim_from_hidden: bool = False
    """The server has no other width of heads than ``hidden_size / num_attention_heads``."""
    server_keys: Mapping[str, Any] = field(default_factory=dict)
    """What the server must be told, and transformers' class always computes."""
    named_head_dim: bool = False
    """The server has no width of heads unless it is given."""
    alternating_yarn: bool = False
    """The server reads neither ``layer_types`` nor the kind of RoPE: every other layer has a
    window, from the first on, and RoPE is YaRN."""
    pre_norms: bool = True
    """There is a norm between the residual stream and its readers."""
    post_norms: tuple[str, ...] = ()
    """Norms between a writer and the residual stream."""
    ends_with_more: bool = False
    """A layer does more behind its feed-forward than to add it to the residual stream."""
    head_norms: tuple[str, ...] = ()
    """Norms of single heads of queries and keys."""
    wide_norms: Mapping[str, str] = field(default_factory=dict)
    """Norms over all heads of queries or of keys, and the dimension of each."""
    norm_offset: float = 0.0
    """A norm multiplies by this plus its stored weight."""
    scaled_embedding: bool = False
    """The embedding is multiplied by the square root of the hidden size."""
    multipliers: Multipliers = field(default_factory=Multipliers)
    layer_types: bool = False
    """The configuration chooses each layer's kind of attention."""
    attention: str = "sdpa"
    """The implementation that transformers computes all settings with."""
    replaced_code: tuple[str, ...] = ()
    """Classes by which ``auto_map`` names Python code that transformers has its own version of."""
    head_is_embedding: bool = False
    """The server has no head beside the embedding."""
    plain_head: bool = False
    """The server does not quantize the head."""
    draft: DraftHead | None = None
    """It stays 16-bit."""
    layers_behind: str = ""
    """Configuration key of how many layers behind the last one are heads that predict further
    tokens from hidden states. They are no part of the model, and left out."""
    sixteen_bit: tuple[str, ...] = ()
    """Linears beside a router that are too small to quantize."""
    parameters: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Dimensions of the tensors of a layer that are neither linears nor norms of ``readers``,
    ``post_norms`` and ``head_norms``. No transform concerns them, and they are kept in float32."""
    linear_attention: LinearAttention | None = None
    latent_attention: LatentAttention | None = None
    kinds: Mapping[str, Architecture] = field(default_factory=dict)
    """The table of each kind of layer, by its name in ``layer_types``, or by :func:`sharing` of it
    for layers that share keys and values; empty where all layers have the tensors that this one
    says."""
    of_config: Callable[[Architecture, Any], Architecture] | None = None
    """Makes the table of one model from this one and its parsed configuration, where that decides
    which tensors layers have."""
    head_sizes: HeadSizes | None = None
    """Of a kind of layer whose heads are not those that the model's configuration says of all."""
    shared_layers: str = ""
    """Configuration key of how many of the last layers compute no keys and values, but attend to
    those of the last layer before them of their kind."""
    layer_embedding: str = ""
    """Configuration key of the width of what every layer is given of a token beside the residual
    stream; 0 there is none."""
    beside: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Dimensions of the tensors beside the layers, by full name, that no transform concerns. They
    stay 16-bit."""
    repeated: Mapping[str, str] = field(default_factory=dict)
    """Linears that the server computes once more under another name, which is not stored."""
    experts: Experts | None = None
    products: tuple[tuple[str, str], ...] = ()
    """Each ``up`` and its ``down`` in a layer: one pair, or that of each expert, then that of a
    shared one."""
    layers: str = "model.layers"
    embedding: str = "model.embed_tokens"
    final_norm: str = "model.norm"
    lm_head: str = "lm_head"

    @property
    def norms(self) -> tuple[str, ...]:
        """The norms of ``readers``."""
        return tuple(self.readers) if self.pre_norms else ()

    @property
    def attention_norm(self) -> str:
        """The norm that q, k and v read, or what they are named by: the first of ``readers``."""
        return next(iter(self.readers))

    @property
    def mlp_norm(self) -> str:
        """The norm that gate and up, or the router and the experts, read, or what they are named
        by: the second."""
        return list(self.readers)[1]

    @property
    def quantized_readers(self) -> tuple[str, ...]:
        """All of ``readers`` but the 16-bit ones."""
        return tuple(chain.from_iterable(map(self._quantized, self.readers.values())))

    @property
    def quantizes_head(self) -> bool:
        """Whether the server can compute the logits from codes."""
        return not (self.head_is_embedding or self.plain_head)

    @property
    def scales_products(self) -> bool:
        """Whether down reads a product that is linear in what up gives out, so that S and the signs
        of R4 can be folded there."""
        return self.experts is None or self.experts.activation == "silu"

    @property
    def rotates_residual(self) -> bool:
        """Whether R1 can be folded. A norm between a writer and the residual stream does not
        commute with a rotation."""
        return not self.post_norms

    def with_experts(self, count: int) -> Self:
        """The table of one model of the family: the names of each of ``count`` experts in place
        of the one with ``{e}``."""

        def each(name: str) -> list[str]:
            return (
                [name.replace(EXPERT, str(e)) for e in range(count)] if EXPERT in name else [name]
            )

        return replace(
            self,
            linears={
                expert: shape for name, shape in self.linears.items() for expert in each(name)
            },
            readers={
                norm: tuple(e for name in names for e in each(name))
                for norm, names in self.readers.items()
            },
            biases={
                flag: tuple(expert for name in names for expert in each(name))
                for flag, names in self.biases.items()
            },
            writers=tuple(expert for name in self.writers for expert in each(name)),
            products=(
                *zip(each(self.up), each(self.down), strict=True),
                *(linears[1:] for linears in self._shared_linears()),
            ),
            kinds={kind: table.with_experts(count) for kind, table in self.kinds.items()},
        )

    def with_sparse_feed_forward(self, experts: Experts, *, up: str, down: str, **own: Any) -> Self:
        """The table of a family that has experts in place of this one's feed-forward.

        Args:
            experts: what it says of them.
            up, down: of an expert.
            own: other fields that differ.
        """
        attention = {self.value, *chain.from_iterable(self.attention_groups())}
        gated = {
            experts.router: ("experts", "hidden"),
            experts.gate: ("intermediate", "hidden"),
            up: ("intermediate", "hidden"),
        }
        downs = {down: ("hidden", "intermediate")}
        table = replace(self, up=up, down=down, experts=experts, **own)
        if experts.shared is not None:
            ((shared_gate, shared_up, shared_down),) = table._shared_linears()
            gated |= {shared_gate: ("shared", "hidden"), shared_up: ("shared", "hidden")}
            if experts.shared.gate:
                gated[experts.shared.gate] = ("one", "hidden")
            downs[shared_down] = ("hidden", "shared")
        kept = {name: shape for name, shape in table.linears.items() if name in attention}
        biases = dict(table.biases)
        if experts.biased:
            biases[""] = (*biases.get("", ()), *gated, *downs)
        return replace(
            table,
            linears=kept | gated | downs,
            biases=biases,
            readers={**table.readers, table.mlp_norm: tuple(gated)},
            writers=(table.output, *downs),
        )

    def behind_dense_layers(self, dense: Architecture) -> Self:
        """The table of a family whose layers have experts, as here, but the first, which are as in
        ``dense``."""
        widths = {"intermediate": "dense"}
        linears = {
            name: (widths.get(out, out), widths.get(inputs, inputs))
            for name, (out, inputs) in dense.linears.items()
        }
        return replace(self, kinds={DENSE: replace(dense, linears=linears), SPARSE: self})

    @property
    def feed_forward(self) -> str:
        """Name of the module that computes what follows the second norm of ``readers``."""
        return (self.down if self.experts is None else self.experts.router).rpartition(".")[0]

    def expert_groups(self) -> tuple[list[tuple[str, ...]], list[tuple[str, ...]]]:
        """Linears of each expert that read the same tensor: gate and up, then down."""
        assert self.experts is not None
        products = self.products[: len(self.products) - len(self._shared_linears())]
        gates = [self.experts.gate.replace(EXPERT, str(e)) for e in range(len(products))]
        first: list[tuple[str, ...]] = [
            (gate, up) for gate, (up, _) in zip(gates, products, strict=True)
        ]
        return first, [(down,) for _, down in products]

    def common_groups(self) -> list[tuple[str, ...]]:
        """Linears of the feed-forward that read the same tensor of every token, in the order data
        reaches them: all but those of experts that tokens are routed to, and what chooses them."""
        if self.experts is None:
            return [self.readers[self.mlp_norm], (self.down,)]
        return [
            group for gate, up, down in self._shared_linears() for group in ((gate, up), (down,))
        ]

    def _shared_linears(self) -> list[tuple[str, str, str]]:
        """Gate, up and down of the shared expert, if there is one."""
        if self.experts is None or self.experts.shared is None:
            return []
        gate, up, down = (
            f"{self.experts.shared.module}.{name.rpartition('.')[2]}"
            for name in (self.experts.gate, self.up, self.down)
        )
        return [(gate, up, down)]

    def scheme_groups(self) -> list[list[tuple[str, ...]]]:
        """Linears that have one scheme, each as groups of those that read the same tensor. A
        layer's experts all have one, but for a shared one."""
        if self.experts is None:
            return [[self._quantized(group)] for group in self.input_groups()]
        gated, down = self.expert_groups()
        common = [*self.attention_groups(), *self.common_groups()]
        return [*([self._quantized(group)] for group in common), gated + down]

    def _quantized(self, group: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(linear for linear in group if linear not in self.sixteen_bit)

    @property
    def unquantized(self) -> tuple[str, ...]:
        """Linears that stay 16-bit: those of ``sixteen_bit``, the router, the gate of a shared
        expert."""
        if self.experts is None:
            return self.sixteen_bit
        shared = self.experts.shared
        gate = (shared.gate,) if shared is not None and shared.gate else ()
        return (*self.sixteen_bit, self.experts.router, *gate)

    def input_groups(self) -> list[tuple[str, ...]]:
        """Linears that read the same tensor, in the order data reaches them: attention first,
        then the feed-forward."""
        downs = ((down,) for _, down in self.products)
        return [*self.attention_groups(), self.readers[self.mlp_norm], *downs]

    def attention_groups(self) -> list[tuple[str, ...]]:
        """Those of attention."""
        return [self.readers[self.attention_norm], *self.inner, (self.output,)]
