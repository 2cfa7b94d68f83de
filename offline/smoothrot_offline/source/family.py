# SPDX-License-Identifier: Apache-2.0
"""One model of a family: its table and its sizes."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Self

from smoothrot_offline.source.architecture import DENSE, SPARSE, Architecture, Shape, sharing
from smoothrot_offline.source.dimensions import dimensions
from smoothrot_offline.source.parts import DraftHead, HeadSizes

if TYPE_CHECKING:  # the tables must be there without the seconds that these take
    import torch
    from transformers import PreTrainedConfig

    from smoothrot_offline.source.composite import Composite
    from smoothrot_vllm.format import QuantizationSchema


@dataclass(frozen=True)
class ModelSpec:
    """One model: its family's table and its sizes.

    ``intermediate`` is the width of down_proj's input, with ``experts`` that of each of them;
    ``shared`` the one of an expert beside them, ``dense`` that of layers without, 0 where there are
    none. Of a text tower ``config`` is its
    own, ``outer`` that around it; ``composite`` is the table of the whole, and ``kept`` has the
    shapes of the tensors beside the tower, or beside the layers. With its own ``draft`` head these
    are among them. Where heads differ by layer, ``kv_heads`` and ``head_dim`` are the first
    layer's.
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
    shared: int = 0
    dense: int = 0
    composite: Composite | None = None
    outer: PreTrainedConfig | None = None
    kept: Mapping[str, Shape] = field(default_factory=dict)
    draft: DraftHead | None = None

    def with_draft(self, head: DraftHead, layers: int) -> Self:
        """The specification with a draft head of that many layers."""
        sizes = self.dimensions(self.architecture)
        shapes: dict[str, Shape] = {
            f"{head.module}.{name}": tuple(sizes[dimension] for dimension in dimensions)
            for name, dimensions in head.tensors.items()
        }
        for index in range(layers):
            shapes |= {
                f"{head.module}.layers.{index}.{name}": shape
                for name, shape in self._tensors_of(self.architecture.kinds[head.kind]).items()
            }
        return replace(self, kept={**self.kept, **shapes}, draft=head)

    def down_widths(self, index: int) -> list[int]:
        """Width of the input of each down_proj of decoder layer ``index``, in the order of
        ``products``: that of its smoothing scales."""
        table = self.layer_table(index)
        return [self.linear_shape(down, table)[1] for _, down in table.products]

    @property
    def widest(self) -> int:
        """The largest width of a down_proj's input."""
        return max(self.intermediate, self.shared, self.dense)

    def other_widths(self) -> dict[str, int]:
        """Width of the input of each down_proj that is not ``intermediate``, by the name of the
        module it is in."""
        experts, widths = self.architecture.experts, dict[str, int]()
        if experts is not None and experts.shared is not None:
            widths[experts.shared.module.rpartition(".")[2]] = self.shared
        if self.dense:
            module = self.architecture.kinds[DENSE].feed_forward
            widths[module.rpartition(".")[2]] = self.dense
        return widths

    def experts_in(self, index: int) -> int:
        """How many experts tokens are routed to in decoder layer ``index``."""
        return 0 if self.layer_table(index).experts is None else self.experts

    @property
    def sparse_layers(self) -> int:
        """How many layers have experts."""
        return sum(count for table, count in self._tables() if table.experts is not None)

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

    def head_sizes(self, table: Architecture) -> HeadSizes:
        """Key-value heads of a layer with this table, and the width of its heads."""
        return table.head_sizes or HeadSizes(self.kv_heads, self.head_dim)

    @property
    def stream(self) -> int:
        """Width of all that a layer reads and gives out while layers run one by one: the residual
        stream, what every layer is given of a token, and keys and values of
        :attr:`shared_sources`."""
        shared = (self.head_sizes(self.layer_table(index)) for index in self.shared_sources)
        return (
            self.hidden
            + self.layers * self.layer_embedding
            + sum(2 * kv_heads * head_dim for kv_heads, head_dim in shared)
        )

    @property
    def layer_embedding(self) -> int:
        """Width of what each layer is given of a token beside the residual stream."""
        return self._size(self.architecture.layer_embedding)

    @property
    def shared_sources(self) -> list[int]:
        """The layers whose keys and values later ones share."""
        return sorted({self.values_of(index) for index in range(self._own_values, self.layers)})

    @property
    def _own_values(self) -> int:
        """How many layers compute keys and values: the first ones."""
        return self.layers - self._size(self.architecture.shared_layers)

    def _size(self, key: str) -> int:
        return int(getattr(self.config, key) or 0) if key else 0

    def values_of(self, index: int) -> int:
        """The layer whose keys and values decoder layer ``index`` attends to: itself, but where it
        shares another's."""
        if index < self._own_values:
            return index
        kinds = self.config.layer_types
        return max(i for i in range(self._own_values) if kinds[i] == kinds[index])

    def token_flop(self, seqlen: int) -> float:
        """Floating-point operations of a token through all decoder layers, in a sequence of
        ``seqlen``: it meets only the experts it is routed to."""
        chosen = self.config.num_experts_per_tok if self.experts else 0
        idle = 3 * (self.experts - chosen) * self.intermediate * self.hidden
        total = 2 * (self.decoder_weights() - self.sparse_layers * idle)
        for table, count in self._tables():
            if table.linear_attention is None:
                attention = 4 * seqlen * self.heads * self.head_sizes(table).head_dim
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
        counts = Counter(map(self.kind, range(self.layers)))
        return [(self.architecture.kinds[kind], count) for kind, count in counts.items()]

    def kind(self, index: int) -> str:
        """The kind of decoder layer ``index``, of a family that has several."""
        experts = self.architecture.experts
        if experts is not None and experts.dense:
            return DENSE if index < getattr(self.config, experts.dense) else SPARSE
        kind: str = self.config.layer_types[index]
        return kind if index < self._own_values else sharing(kind)

    def layer_table(self, index: int) -> Architecture:
        """The table of decoder layer ``index``: the family's, or that of the layer's kind."""
        kinds = self.architecture.kinds
        return kinds[self.kind(index)] if kinds else self.architecture

    def layer_weights(self) -> list[int]:
        """Weights of each linear of the decoder layer that has the most."""
        return max(
            (
                [math.prod(self.linear_shape(linear, table)) for linear in table.linears]
                for table in self.tables
            ),
            key=sum,
        )

    def decoder_weights(self) -> int:
        """Weights of all linears of all decoder layers."""
        return sum(
            count * math.prod(self.linear_shape(linear, table))
            for table, count in self._tables()
            for linear in table.linears
        )

    def rotates_heads(self, index: int) -> bool:
        """Whether R2 can be folded into the values that decoder layer ``index`` computes."""
        return bool(self.layer_table(index).value)

    @property
    def rotated_heads(self) -> list[int]:
        """Widths of the heads that R2 can be folded into."""
        tables = (table for table in self.tables if table.value)
        return sorted({self.head_sizes(table).head_dim for table in tables})

    def capped(self, logits: torch.Tensor) -> torch.Tensor:
        """What the model makes of the head's outputs, of any shape: divided by its divisor, and
        ``cap * tanh(logits / cap)`` if it caps them."""
        import torch

        logits = logits / self._multiplier(self.architecture.multipliers.logits)
        cap = getattr(self.config, "final_logit_softcapping", None)
        return logits if cap is None else cap * torch.tanh(logits / cap)

    def dimensions(self, table: Architecture) -> dict[str, int]:
        """What the names of dimensions in a table of this model stand for."""
        return dimensions(self, table)

    def linear_shape(self, linear: str, table: Architecture | None = None) -> tuple[int, int]:
        """``(out_features, in_features)`` of a decoder linear, named relative to a layer with this
        table, the first that has it unless given."""
        table = table or next(table for table in self.tables if linear in table.linears)
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
        """What stays 16-bit beside embedding and head, as ``quantization_config.ignore`` has it."""
        beside = () if self.composite is None else self.composite.kept
        alone = (name.removesuffix(".weight") for name in self.architecture.beside)
        linears = (
            self.layer_prefix(index) + linear
            for index in range(self.layers)
            for linear in self.layer_table(index).unquantized
        )
        if self.draft is not None:
            beside = (*beside, self.draft.module)
        return [*linears, *alone, *(f"{module}." for module in beside)]

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
        return self._tensors_of(self.layer_table(index))

    def _tensors_of(self, table: Architecture) -> dict[str, Shape]:
        sizes = self.dimensions(table)
        biased, shapes = self.biased(), dict[str, Shape]()
        for linear, (out, inputs) in table.linears.items():
            shapes[f"{linear}.weight"] = (sizes[out], sizes[inputs])
            if linear in biased:
                shapes[f"{linear}.bias"] = (sizes[out],)
        shapes |= {f"{norm}.weight": (self.hidden,) for norm in (*table.norms, *table.post_norms)}
        width = self.head_sizes(table).head_dim
        shapes |= {f"{norm}.weight": (width,) for norm in table.head_norms}
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
        shapes |= self.kept
        for index in range(self.layers):
            shapes |= {
                self.layer_prefix(index) + name: shape
                for name, shape in self.layer_tensors(index).items()
            }
        shapes[f"{table.final_norm}.weight"] = (self.hidden,)
        if not self.tied:
            shapes[f"{table.lm_head}.weight"] = (self.vocab, self.hidden)
        return shapes

    def unread(self, tensors: Iterable[str]) -> list[str]:
        """Those of a checkpoint's ``tensors`` that make keys and values of layers which share
        another's."""
        found = set()
        for index in range(self.layers):
            if self.values_of(index) != index:
                whole = self.architecture.kinds[self.config.layer_types[index]]
                left = self._tensors_of(whole).keys() - self.layer_tensors(index).keys()
                found |= {self.layer_prefix(index) + name for name in left}
        return [name for name in tensors if name in found]

    def behind(self, tensors: Iterable[str]) -> list[str]:
        """Those of a checkpoint's ``tensors`` that are of layers behind the last one, heads that
        draft tokens."""
        heads = range(self.layers, self.layers + self._size(self.architecture.layers_behind))
        layers = f"{self.architecture.layers}."

        def is_behind(name: str) -> bool:
            number = name.removeprefix(layers).partition(".")[0]
            return name.startswith(layers) and number.isdecimal() and int(number) in heads

        return [name for name in tensors if is_behind(name)]

    def added_to_draft(self) -> list[str]:
        """Full names of the tensors that its own draft head gets, unless hidden states stay the
        source's."""
        from smoothrot_vllm.format import DRAFT_INPUT, DRAFT_OUTPUT

        if self.draft is None:
            return []
        return [f"{self.draft.module}.{linear}.weight" for linear in (DRAFT_INPUT, DRAFT_OUTPUT)]

    def output_linears(self, tied: bool) -> Iterator[tuple[str, int, int]]:
        """``(full name, out_features, in_features)`` of each linear of the output; the head
        unless it stays ``tied``."""
        for index in range(self.layers):
            table = self.layer_table(index)
            for linear in table.linears:
                yield self.layer_prefix(index) + linear, *self.linear_shape(linear, table)
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
        if schema.online.readers is None:
            tensors |= dict.fromkeys(self.added_to_draft(), ((self.hidden, self.hidden), dtype))
        for name, out, inputs in self.output_linears(tied):
            scheme = schema.scheme(name)
            if scheme is None:
                tensors[f"{name}.weight"] = ((out, inputs), dtype)
                continue
            tensors.pop(f"{name}.weight", None)
            for suffix, stored in weight_tensors(out, inputs, scheme.weights).items():
                tensors[f"{name}.{suffix}"] = stored
        return tensors
