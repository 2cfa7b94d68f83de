# SPDX-License-Identifier: Apache-2.0
"""What a family's table says of experts and of attention."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:  # it imports torch
    from smoothrot_vllm.reference import Activation


@dataclass(frozen=True)
class SharedExpert:
    """What every token goes through beside the experts that are chosen for it.

    ``module`` is its name, whose linears are called like those of an expert; ``intermediate`` the
    configuration key of its width, or with ``count`` that of one of so many that stand side by side
    in it; ``gate`` the linear whose sigmoid its output is multiplied by, which stays 16-bit ("" =
    none).
    """

    module: str
    intermediate: str
    gate: str = ""
    count: str = ""


@dataclass(frozen=True)
class Routing:
    """How experts are chosen for a token by what the router gives out, and what their outputs are
    multiplied by: softmax over all experts, or with ``sigmoid`` of each by itself.

    ``correction`` is a tensor of the router that is added to these scores for the choice alone.
    Experts stand in as many groups as the configuration key ``groups`` says; of so many as
    ``kept_groups`` says, whose sums of their ``of_group`` best scores are the largest, they are
    chosen. ``scale`` is the key of what the weights are multiplied by at last. "" stands for what
    there is none of.
    """

    sigmoid: bool = False
    correction: str = ""
    groups: str = ""
    kept_groups: str = ""
    of_group: int = 1
    scale: str = ""


@dataclass(frozen=True)
class Experts:
    """What the table of a family with a mixture of experts says beside the names of its linears.

    ``count`` and ``intermediate`` are the configuration keys of the number of experts and of the
    width of one. ``router`` is the linear that chooses among them, which stays 16-bit; ``gate`` the
    linear of an expert that the activation follows. ``normalizes`` is the configuration flag under
    which the weights of a token's experts are made to sum to one ("" = always), ``everywhere`` the
    values of keys that say that every layer has experts. ``dense`` is the key of how many of the
    first layers have none, "" where all have. ``shared`` is an expert beside them.
    ``activation`` is what makes one of an expert's gate and up; ``biased`` says that an expert's
    linears and the router have biases. ``interleaved`` says that transformers stores fused
    experts ``(experts, inputs, outputs)``, gates and ups taking turns, ``gives_scores`` that its
    feed-forward gives out a pair, the router's scores second.
    """

    count: str
    intermediate: str
    router: str
    gate: str
    normalizes: str = ""
    everywhere: Mapping[str, Any] = field(default_factory=dict)
    dense: str = ""
    shared: SharedExpert | None = None
    routing: Routing = Routing()
    activation: Activation = "silu"
    biased: bool = False
    interleaved: bool = False
    gives_scores: bool = False


class HeadSizes(NamedTuple):
    """How many heads keys and values have in a layer, and how wide all heads are there."""

    kv_heads: int
    head_dim: int


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
class LatentAttention:
    """Configuration keys of the sizes of attention whose keys and values are made of a narrow
    latent state of each token, and queries, where there is a ``query_rank``, of another.

    In a linear that makes both, each head's ``keys`` are before its ``values``; ``rotary`` is what
    RoPE turns beside them.
    """

    query_rank: str
    rank: str
    keys: str
    rotary: str
    values: str


@dataclass(frozen=True)
class DraftHead:
    """A head that predicts further tokens from what the final norm gives out and from their
    embeddings (multi-token prediction). A checkpoint of the family may have it or not.

    ``layers`` is the configuration key of how many decoder layers it has, one without the key, and
    ``kind`` which they are. ``tensors`` are the dimensions of the others, named relative to
    ``module``.
    """

    layers: str
    module: str = "mtp"
    kind: str = "full_attention"
    tensors: Mapping[str, tuple[str, ...]] = field(
        default_factory=lambda: {
            "fc.weight": ("hidden", "two_hidden"),
            "pre_fc_norm_embedding.weight": ("hidden",),
            "pre_fc_norm_hidden.weight": ("hidden",),
            "norm.weight": ("hidden",),
        }
    )

    def has(self, name: str) -> bool:
        """Whether a tensor or a module by its full name is one of the head."""
        return name.startswith(f"{self.module}.")


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
