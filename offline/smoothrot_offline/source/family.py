# SPDX-License-Identifier: Apache-2.0
"""What a model family must say about itself, and the sizes of one model of it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:  # the tables must be there without the seconds that these take
    import torch
    from transformers import PreTrainedConfig

    from smoothrot_offline.source.composite import Composite
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
class Architecture:
    """Where the rotations and scales of one model family are folded. Names are relative to a
    decoder layer; those that hold ``{e}`` are of each expert, see :meth:`with_experts`."""

    model_type: str
    class_name: str
    linears: Mapping[str, tuple[str, str]]
    """(Output, input) dimension of each linear: hidden, intermediate, query, value, or of those
    that the family stores as one, query_key_value and gate_up."""
    biases: Mapping[str, tuple[str, ...]]
    """Linears with a bias, by the configuration flag that says so ("" = always)."""
    readers: Mapping[str, tuple[str, ...]]
    """Linears that read each norm's output: attention's norm first, then the feed-forward's."""
    writers: tuple[str, ...]
    """Linears that add to the residual stream, of a family with ``post_norms`` through one."""
    value: str
    """Produces, in its last rows, the heads that ``output`` consumes."""
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
    rotary_sections: bool = False
    """Both rotate sections of each head by the coordinates of an image."""
    one_window: bool = False
    """The server has the same window in all layers."""
    head_dim_from_hidden: bool = False
    """The server has no other width of heads than ``hidden_size / num_attention_heads``."""
    post_norms: tuple[str, ...] = ()
    """Norms between a writer and the residual stream."""
    head_norms: tuple[str, ...] = ()
    """Norms of single heads of queries and keys."""
    norm_offset: float = 0.0
    """A norm multiplies by this plus its stored weight."""
    scaled_embedding: bool = False
    """The embedding is multiplied by the square root of the hidden size."""
    layer_types: bool = False
    """The configuration chooses each layer's kind of attention."""
    attention: str = "sdpa"
    """The implementation that transformers computes all settings with."""
    replaced_code: tuple[str, ...] = ()
    """Classes by which ``auto_map`` names Python code that transformers has its own version of."""
    head_is_embedding: bool = False
    """The server has no head beside the embedding."""
    experts: Experts | None = None
    products: tuple[tuple[str, str], ...] = ()
    """Each ``up`` and its ``down`` in a layer: one pair, or that of each expert."""
    layers: str = "model.layers"
    embedding: str = "model.embed_tokens"
    final_norm: str = "model.norm"
    lm_head: str = "lm_head"

    @property
    def attention_norm(self) -> str:
        """The norm that q, k and v read: the first of ``readers``."""
        return next(iter(self.readers))

    @property
    def mlp_norm(self) -> str:
        """The norm that gate and up, or the router and the experts, read: the second."""
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
            return [[group] for group in self.input_groups()]
        gated, down = self.expert_groups()
        return [[self.readers[self.attention_norm]], [(self.output,)], gated + down]

    def input_groups(self) -> list[tuple[str, ...]]:
        """Linears that read the same tensor, in the order data reaches them: attention first,
        then the feed-forward."""
        read = [self.readers[self.attention_norm], (self.output,), self.readers[self.mlp_norm]]
        return [*read, *((down,) for _, down in self.products)]


@dataclass(frozen=True)
class ModelSpec:
    """One model: its family's table and its sizes.

    Of a text tower ``config`` is its own, ``outer`` that around it; ``composite`` is the table of
    the whole, and ``kept`` has the shapes of the tensors beside the tower.
    """

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
    composite: Composite | None = None
    outer: PreTrainedConfig | None = None
    kept: Mapping[str, Shape] = field(default_factory=dict)

    @property
    def smoothed(self) -> Shape:
        """Shape of a layer's smoothing scales: ``(intermediate,)``, or ``(experts,
        intermediate)``."""
        return (self.experts, self.intermediate) if self.experts else (self.intermediate,)

    @property
    def embedding_scale(self) -> float:
        """What the model multiplies the rows of its embedding by."""
        return self.hidden**0.5 if self.architecture.scaled_embedding else 1.0

    @property
    def values(self) -> int:
        """Width of all value heads: the rows of ``value`` that R2 rotates."""
        return self.kv_heads * self.head_dim

    def token_flop(self, seqlen: int) -> float:
        """Floating-point operations of a token through all decoder layers, in a sequence of
        ``seqlen``: it meets only the experts it is routed to."""
        chosen = self.config.num_experts_per_tok if self.experts else 0
        idle = 3 * (self.experts - chosen) * self.intermediate * self.hidden
        attention = 4 * seqlen * self.heads * self.head_dim
        return self.layers * (2 * (sum(self.layer_weights()) - idle) + attention)

    def layer_weights(self) -> list[int]:
        """Weights of each linear of a decoder layer."""
        return [math.prod(self.linear_shape(linear)) for linear in self.architecture.linears]

    def capped(self, logits: torch.Tensor) -> torch.Tensor:
        """What the model makes of the head's outputs, of any shape: ``cap * tanh(logits / cap)``
        if it caps them."""
        import torch

        cap = getattr(self.config, "final_logit_softcapping", None)
        return logits if cap is None else cap * torch.tanh(logits / cap)

    def linear_shape(self, linear: str) -> tuple[int, int]:
        """``(out_features, in_features)`` of a decoder linear, named relative to its layer."""
        sizes = {
            "hidden": self.hidden,
            "intermediate": self.intermediate,
            "query": self.heads * self.head_dim,
            "value": self.values,
            "query_key_value": self.heads * self.head_dim + 2 * self.values,
            "gate_up": 2 * self.intermediate,
            "experts": self.experts,
        }
        out, inputs = self.architecture.linears[linear]
        return sizes[out], sizes[inputs]

    def biased(self) -> set[str]:
        """Decoder linears that have a bias, named relative to their layer."""
        flags = self.architecture.biases.items()
        return {
            linear
            for flag, linears in flags
            if not flag or getattr(self.config, flag)
            for linear in linears
        }

    def routers(self) -> list[str]:
        """Full names of the linears that choose among experts, which stay 16-bit."""
        experts = self.architecture.experts
        return (
            []
            if experts is None
            else [self.layer_prefix(index) + experts.router for index in range(self.layers)]
        )

    def unquantized(self) -> list[str]:
        """What stays 16-bit beside embedding and head, as ``quantization_config.ignore`` has it."""
        beside = () if self.composite is None else self.composite.kept
        return [*self.routers(), *(f"{module}." for module in beside)]

    def layer_prefix(self, index: int) -> str:
        """Prefix of the tensors of decoder layer ``index``, with its final dot."""
        return f"{self.architecture.layers}.{index}."

    def layer_tensors(self) -> dict[str, Shape]:
        """Shape of each tensor of any decoder layer in the source, named relative to the layer."""
        shapes: dict[str, Shape] = {}
        for linear in self.architecture.linears:
            shape = self.linear_shape(linear)
            shapes[f"{linear}.weight"] = shape
            if linear in self.biased():
                shapes[f"{linear}.bias"] = shape[:1]
        shapes |= {
            f"{norm}.weight": (self.hidden,)
            for norm in (*self.architecture.readers, *self.architecture.post_norms)
        }
        return shapes | {
            f"{norm}.weight": (self.head_dim,) for norm in self.architecture.head_norms
        }

    def source_tensors(self) -> dict[str, Shape]:
        """Shape of each tensor the source checkpoint must hold."""
        table = self.architecture
        shapes: dict[str, Shape] = {f"{table.embedding}.weight": (self.vocab, self.hidden)}
        shapes |= self.kept
        for index in range(self.layers):
            shapes |= {
                self.layer_prefix(index) + name: shape
                for name, shape in self.layer_tensors().items()
            }
        shapes[f"{table.final_norm}.weight"] = (self.hidden,)
        if not self.tied:
            shapes[f"{table.lm_head}.weight"] = (self.vocab, self.hidden)
        return shapes

    def output_linears(self, tied: bool) -> Iterator[tuple[str, int, int]]:
        """``(full name, out_features, in_features)`` of each linear of the output; the head
        unless it stays ``tied``."""
        for index in range(self.layers):
            for linear in self.architecture.linears:
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
        from smoothrot_vllm.format import weight_tensors

        tensors = {name: (shape, dtype) for name, shape in self.source_tensors().items()}
        for name, out, inputs in self.output_linears(tied):
            scheme = schema.scheme(name)
            if scheme is None:
                tensors[f"{name}.weight"] = ((out, inputs), dtype)
                continue
            tensors.pop(f"{name}.weight", None)
            for suffix, stored in weight_tensors(out, inputs, scheme.weights).items():
                tensors[f"{name}.{suffix}"] = stored
        return tensors
