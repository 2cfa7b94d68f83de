# SPDX-License-Identifier: Apache-2.0
"""What a model family must say about itself, and the sizes of one model of it."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:  # the tables must be there without the seconds that these take
    import torch
    from transformers import PreTrainedConfig

    from smoothrot_vllm.format import QuantizationSchema


Shape = tuple[int, ...]

EXPERT = "{e}"
"""Stands for an expert's number in a family's names."""


@dataclass(frozen=True)
class Experts:
    """What the table of a family with a mixture of experts says beside the names of its linears.

    ``count`` and ``intermediate`` are the configuration keys of the number of experts and of the
    width of one. ``router`` is the linear that chooses among them, which stays 16-bit; ``gate`` the
    linear of an expert that the activation follows. ``normalizes`` is the configuration flag under
    which the weights of a token's experts are made to sum to one ("" = always), ``everywhere`` the
    values of keys that say that every layer has experts.
    """

    count: str
    intermediate: str
    router: str
    gate: str
    normalizes: str = ""
    everywhere: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class LinearAttention:
    """Configuration keys of the sizes of layers whose attention is a recurrence over a state, the
    gated delta rule: how many key and value heads, their widths, and how many tokens the
    convolution before it sees."""

    key_heads: str
    value_heads: str
    key_head_dim: str
    value_head_dim: str
    kernel: str


@dataclass(frozen=True)
class Multipliers:
    """Configuration keys of single numbers that a model computes with, "" where it has none. They
    commute with every fold.

    ``embedding`` multiplies what the first layer reads, embeddings given from outside too;
    ``residual`` what a writer adds to the residual stream; ``logits`` divides what the head gives
    out.
    """

    embedding: str = ""
    residual: str = ""
    logits: str = ""


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
    """Produces, in its last rows, the factor of ``act(gate(x)) * up(x)`` that is linear in x."""
    down: str
    """Consumes that product."""
    settings: Mapping[str, tuple[Any, ...]]
    """Values of a configuration key that transformers and the server both compute, the one of a
    key that is not there first."""
    same: Mapping[str, str] = field(default_factory=dict)
    """Keys of the server's alone that must say what another says."""
    partial_rotary: bool = False
    """Both rotate a part of each head if told so."""
    scaled_queries: bool = False
    """Queries grow with their position by ``llama_4_scaling_beta`` of the rotary parameters, which
    the server knows as a key of its own."""
    rope_in_windows: bool = False
    """Where some layers have a window, only they have RoPE. transformers takes ``sliding_window``
    for a sign of it, the server such a layer."""
    one_window: bool = False
    """The server has the same window in all layers."""
    head_dim_from_hidden: bool = False
    """The server has no other width of heads than ``hidden_size / num_attention_heads``."""
    pre_norms: bool = True
    """There is a norm between the residual stream and its readers."""
    post_norms: tuple[str, ...] = ()
    """Norms between a writer and the residual stream."""
    head_norms: tuple[str, ...] = ()
    """Norms of single heads of queries and keys."""
    wide_norms: Mapping[str, str] = field(default_factory=dict)
    """Norms over all heads of queries or of keys, and the dimension of each."""
    norm_offset: float = 0.0
    """A norm multiplies by this plus its stored weight."""
    scaled_embedding: bool = False
    """The embedding is multiplied by the square root of the hidden size."""
    multipliers: Multipliers = Multipliers()
    layer_types: bool = False
    """The configuration chooses each layer's kind of attention."""
    attention: str = "sdpa"
    """The implementation that transformers computes all settings with."""
    replaced_code: tuple[str, ...] = ()
    """Classes by which ``auto_map`` names Python code that transformers has its own version of."""
    head_is_embedding: bool = False
    """The server has no head beside the embedding."""
    sixteen_bit: tuple[str, ...] = ()
    """Linears beside a router that are too small to quantize."""
    parameters: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Dimensions of the tensors of a layer that are neither linears nor norms of ``readers``,
    ``post_norms`` and ``head_norms``. No transform concerns them, and they are kept in float32."""
    linear_attention: LinearAttention | None = None
    kinds: Mapping[str, Architecture] = field(default_factory=dict)
    """The table of each kind of layer, by its name in ``layer_types``; empty where all layers have
    the tensors that this one says."""
    axes_of_positions: bool = False
    """Both give all axes of a position in rotary parameters with ``mrope_section`` the number of
    the token, so that it changes nothing."""
    experts: Experts | None = None
    products: tuple[tuple[str, str], ...] = ()
    """Each ``up`` and its ``down`` in a layer: one pair, or that of each expert."""
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
            writers=tuple(expert for name in self.writers for expert in each(name)),
            products=tuple(zip(each(self.up), each(self.down), strict=True)),
            kinds={kind: table.with_experts(count) for kind, table in self.kinds.items()},
        )

    def with_sparse_feed_forward(self, experts: Experts, *, up: str, down: str, **own: Any) -> Self:
        """The table of a family that has experts in place of this one's feed-forward.

        Args:
            experts: what it says of them.
            up, down: of an expert.
            own: other fields that differ.
        """
        attention = {self.value, self.output, *self.readers[self.attention_norm]}
        gated = {
            experts.router: ("experts", "hidden"),
            experts.gate: ("intermediate", "hidden"),
            up: ("intermediate", "hidden"),
        }
        return replace(
            self,
            linears={name: shape for name, shape in self.linears.items() if name in attention}
            | gated
            | {down: ("hidden", "intermediate")},
            readers={**self.readers, self.mlp_norm: tuple(gated)},
            writers=(self.output, down),
            up=up,
            down=down,
            experts=experts,
            **own,
        )

    @property
    def feed_forward(self) -> str:
        """Name of the module that computes what follows the second norm of ``readers``."""
        return (self.down if self.experts is None else self.experts.router).rpartition(".")[0]

    def expert_groups(self) -> tuple[list[tuple[str, ...]], list[tuple[str, ...]]]:
        """Linears of each expert that read the same tensor: gate and up, then down."""
        assert self.experts is not None
        gates = [self.experts.gate.replace(EXPERT, str(e)) for e in range(len(self.products))]
        first: list[tuple[str, ...]] = [
            (gate, up) for gate, (up, _) in zip(gates, self.products, strict=True)
        ]
        return first, [(down,) for _, down in self.products]

    def scheme_groups(self) -> list[list[tuple[str, ...]]]:
        """Linears that have one scheme, each as groups of those that read the same tensor. A
        layer's experts all have one."""
        if self.experts is None:
            return [[self._quantized(group)] for group in self.input_groups()]
        gated, down = self.expert_groups()
        attention = self._quantized(self.readers[self.attention_norm])
        return [[attention], [(self.output,)], gated + down]

    def _quantized(self, group: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(linear for linear in group if linear not in self.sixteen_bit)

    @property
    def unquantized(self) -> tuple[str, ...]:
        """Linears that stay 16-bit: the router and those of ``sixteen_bit``."""
        return self.sixteen_bit + (() if self.experts is None else (self.experts.router,))

    def input_groups(self) -> list[tuple[str, ...]]:
        """Linears that read the same tensor, in the order data reaches them: attention first,
        then the feed-forward."""
        read = [self.readers[self.attention_norm], (self.output,), self.readers[self.mlp_norm]]
        return [*read, *((down,) for _, down in self.products)]


@dataclass(frozen=True)
class ModelSpec:
    """One model: its family's table and its sizes."""

    architecture: Architecture
    config: PreTrainedConfig
    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    tied: bool
    experts: int = 0

    @property
    def smoothed(self) -> Shape:
        """Shape of a layer's smoothing scales: ``(intermediate,)``, or ``(experts,
        intermediate)``."""
        return (self.experts, self.intermediate) if self.experts else (self.intermediate,)

    @property
    def embedding_scale(self) -> float:
        """What the model multiplies the rows of its embedding by."""
        if self.architecture.scaled_embedding:
            return self.hidden**0.5
        return self._multiplier(self.architecture.multipliers.embedding)

    @property
    def residual_scale(self) -> float:
        """What the model multiplies by before it adds to the residual stream."""
        return self._multiplier(self.architecture.multipliers.residual)

    def _multiplier(self, key: str) -> float:
        return float(getattr(self.config, key)) if key else 1.0

    @property
    def values(self) -> int:
        """Width of all value heads: the rows of ``value`` that R2 rotates."""
        return self.kv_heads * self.head_dim

    def token_flop(self, seqlen: int) -> float:
        """Floating-point operations of a token through all decoder layers, in a sequence of
        ``seqlen``: it meets only the experts it is routed to."""
        chosen = self.config.num_experts_per_tok if self.experts else 0
        idle = 3 * (self.experts - chosen) * self.intermediate * self.hidden
        total = 2 * (self.decoder_weights() - self.layers * idle)
        for table, count in self._tables():
            if table.linear_attention is None:
                attention = 4 * seqlen * self.heads * self.head_dim
            else:  # the state of each head decays, is read twice and written once
                sizes = self.dimensions(table)
                attention = 7 * sizes["delta_value"] * sizes["delta_key_head"]
            total += count * attention
        return total

    @property
    def tables(self) -> list[Architecture]:
        """The table of each kind of layer that the model has."""
        return [table for table, _ in self._tables()]

    def _tables(self) -> list[tuple[Architecture, int]]:
        """The table of each kind of layer, and how many layers are of that kind."""
        if not self.architecture.kinds:
            return [(self.architecture, self.layers)]
        counts = Counter(self.config.layer_types)
        return [(self.architecture.kinds[kind], count) for kind, count in counts.items()]

    def layer_table(self, index: int) -> Architecture:
        """The table of decoder layer ``index``: the family's, or that of the layer's kind."""
        kinds = self.architecture.kinds
        return kinds[self.config.layer_types[index]] if kinds else self.architecture

    def layer_weights(self) -> list[int]:
        """Weights of each linear of the decoder layer that has the most."""
        return max(
            (
                [math.prod(self.linear_shape(linear)) for linear in table.linears]
                for table in self.tables
            ),
            key=sum,
        )

    def decoder_weights(self) -> int:
        """Weights of all linears of all decoder layers."""
        return sum(
            count * math.prod(self.linear_shape(linear))
            for table, count in self._tables()
            for linear in table.linears
        )

    def rotates_heads(self, index: int) -> bool:
        """Whether R2 can be folded into decoder layer ``index``."""
        return bool(self.layer_table(index).value)

    def capped(self, logits: torch.Tensor) -> torch.Tensor:
        """What the model makes of the head's outputs, of any shape: divided by its divisor, and
        ``cap * tanh(logits / cap)`` if it caps them."""
        import torch

        logits = logits / self._multiplier(self.architecture.multipliers.logits)
        cap = getattr(self.config, "final_logit_softcapping", None)
        return logits if cap is None else cap * torch.tanh(logits / cap)

    def dimensions(self, table: Architecture) -> dict[str, int]:
        """What the names of dimensions in a table of this model stand for."""
        query = self.heads * self.head_dim
        sizes = {
            "hidden": self.hidden,
            "intermediate": self.intermediate,
            "query": query,
            "gated_query": 2 * query,
            "value": self.values,
            "query_key_value": query + 2 * self.values,
            "gate_up": 2 * self.intermediate,
            "experts": self.experts,
            "one": 1,
        }
        if (keys := table.linear_attention) is not None:
            heads, width = (
                getattr(self.config, key) for key in (keys.value_heads, keys.value_head_dim)
            )
            key_width = getattr(self.config, keys.key_head_dim)
            sizes |= {
                "delta_heads": heads,
                "delta_key_head": key_width,
                "delta_value_head": width,
                "delta_value": heads * width,
                "delta_query_key_value": 2 * getattr(self.config, keys.key_heads) * key_width
                + heads * width,
                "delta_kernel": getattr(self.config, keys.kernel),
            }
        return sizes

    def linear_shape(self, linear: str) -> tuple[int, int]:
        """``(out_features, in_features)`` of a decoder linear, named relative to its layer, the
        same in each layer that has it."""
        table = next(table for table in self.tables if linear in table.linears)
        sizes = self.dimensions(table)
        out, inputs = table.linears[linear]
        return sizes[out], sizes[inputs]

    def biased(self) -> set[str]:
        """Decoder linears that have a bias, named relative to their layer."""
        return {
            linear
            for table in self.tables
            for flag, linears in table.biases.items()
            if not flag or getattr(self.config, flag)
            for linear in linears
        }

    def unquantized(self) -> list[str]:
        """Full names of the decoder linears that stay 16-bit."""
        return [
            self.layer_prefix(index) + linear
            for index in range(self.layers)
            for linear in self.layer_table(index).unquantized
        ]

    def parameters(self) -> set[str]:
        """Full names of the tensors of layers that no transform concerns."""
        return {
            self.layer_prefix(index) + name
            for index in range(self.layers)
            for name in self.layer_table(index).parameters
        }

    def layer_prefix(self, index: int) -> str:
        """Prefix of the tensors of decoder layer ``index``, with its final dot."""
        return f"{self.architecture.layers}.{index}."

    def layer_tensors(self, index: int) -> dict[str, Shape]:
        """Shape of each tensor of decoder layer ``index`` in the source, named relative to the
        layer."""
        table, sizes = self.layer_table(index), self.dimensions(self.layer_table(index))
        biased, shapes = self.biased(), dict[str, Shape]()
        for linear, (out, inputs) in table.linears.items():
            shapes[f"{linear}.weight"] = (sizes[out], sizes[inputs])
            if linear in biased:
                shapes[f"{linear}.bias"] = (sizes[out],)
        shapes |= {f"{norm}.weight": (self.hidden,) for norm in (*table.norms, *table.post_norms)}
        shapes |= {f"{norm}.weight": (self.head_dim,) for norm in table.head_norms}
        shapes |= {
            f"{norm}.weight": (sizes[dimension],) for norm, dimension in table.wide_norms.items()
        }
        return shapes | {
            name: tuple(sizes[dimension] for dimension in dimensions)
            for name, dimensions in table.parameters.items()
        }

    def source_tensors(self) -> dict[str, Shape]:
        """Shape of each tensor the source checkpoint must hold."""
        table = self.architecture
        shapes: dict[str, Shape] = {f"{table.embedding}.weight": (self.vocab, self.hidden)}
        for index in range(self.layers):
            shapes |= {
                self.layer_prefix(index) + name: shape
                for name, shape in self.layer_tensors(index).items()
            }
        shapes[f"{table.final_norm}.weight"] = (self.hidden,)
        if not self.tied:
            shapes[f"{table.lm_head}.weight"] = (self.vocab, self.hidden)
        return shapes

    def output_linears(self, tied: bool) -> Iterator[tuple[str, int, int]]:
        """``(full name, out_features, in_features)`` of each linear of the output; the head
        unless it stays ``tied``."""
        for index in range(self.layers):
            for linear in self.layer_table(index).linears:
                yield self.layer_prefix(index) + linear, *self.linear_shape(linear)
        if not tied:
            yield self.architecture.lm_head, self.vocab, self.hidden

    def output_tensors(
        self, schema: QuantizationSchema, tied: bool, dtype: torch.dtype
    ) -> dict[str, tuple[Shape, torch.dtype]]:
        """Shape and dtype of each tensor of the converted checkpoint; ``dtype`` is that of the
        16-bit tensors.

        Raises:
            ConfigError: a linear does not fit its scheme.
        """
        import torch

        from smoothrot_vllm.format import weight_tensors

        tensors = {name: (shape, dtype) for name, shape in self.source_tensors().items()}
        for name in self.parameters():
            tensors[name] = (tensors[name][0], torch.float32)
        for name, out, inputs in self.output_linears(tied):
            scheme = schema.scheme(name)
            if scheme is None:
                tensors[f"{name}.weight"] = ((out, inputs), dtype)
                continue
            tensors.pop(f"{name}.weight", None)
            for suffix, stored in weight_tensors(out, inputs, scheme.weights).items():
                tensors[f"{name}.{suffix}"] = stored
        return tensors
