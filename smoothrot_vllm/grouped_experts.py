# SPDX-License-Identifier: Apache-2.0
"""The experts of a mixture: the tokens sorted by expert, then one op a linear for all experts.

Every shape follows from those of the arguments and nothing waits for the device, so a CUDA graph
may hold all of it.
"""

from dataclasses import dataclass
from typing import Any

import torch

TILE_TOKENS = 64
"""Tokens of one expert that a tile holds at most, csrc/common/types.h."""
_ACTIVATIONS = {"silu": "silu_mul_hadamard_quant", "swigluoai": "swigluoai_hadamard_quant"}
"""The op of each :data:`reference.Activation`."""


def most_tiles(rows: int, experts: int) -> int:
    """Tiles that ``rows`` rows need at most, whoever they are routed to: each expert with rows
    has one that is not full."""
    used = min(rows, experts)
    return used + (rows - used) // TILE_TOKENS


@dataclass(frozen=True)
class Route:
    """Where each token goes. A row is one expert's work on one token; rows are sorted by expert,
    then by token.

    Args:
        token: of each row, int64 ``(T * top_k,)``.
        tiles: int32 ``(3, most_tiles)``: expert, first row, and the end of the expert's rows; no
            rows in surplus tiles.
        sources: the rows of each token, int32 ``(T, top_k)``, in the order of their experts.
        slots: which of a token's ``top_k`` each of these is, int64 ``(T, top_k)``.
    """

    token: torch.Tensor
    tiles: torch.Tensor
    sources: torch.Tensor
    slots: torch.Tensor

    @classmethod
    def of(cls, chosen: torch.Tensor, experts: int) -> "Route":
        """The route of tokens to their experts.

        Args:
            chosen: numbers of experts, integers ``(T, top_k)``; rows of a number that is no
                expert are in no tile.
            experts: how many there are.
        """
        top_k = chosen.shape[1]
        numbers, order = chosen.flatten().sort(stable=True)
        row_of = torch.empty_like(order).scatter_(
            0, order, torch.arange(len(order), device=order.device)
        )
        sources, slots = row_of.view(-1, top_k).sort(dim=1)
        first = torch.searchsorted(
            numbers, torch.arange(experts + 1, dtype=numbers.dtype, device=numbers.device)
        )
        tile_counts = (first.diff() + TILE_TOKENS - 1) // TILE_TOKENS
        tile_ends = tile_counts.cumsum(0)
        tile = torch.arange(most_tiles(len(order), experts), device=order.device)
        # Past the last tile it is the last expert's, from beyond its rows on.
        expert = torch.searchsorted(tile_ends, tile, right=True).clamp(max=experts - 1)
        begin = first[expert] + (tile - (tile_ends - tile_counts)[expert]) * TILE_TOKENS
        return cls(
            order // top_k,
            torch.stack((expert, begin, first[expert + 1])).int(),
            sources.int(),
            slots,
        )


def grouped_experts(
    library: Any,
    x: torch.Tensor,
    weights: torch.Tensor,
    chosen: torch.Tensor,
    w13: torch.Tensor,
    w13_scale: torch.Tensor,
    w2: torch.Tensor,
    w2_scale: torch.Tensor,
    block: int,
    clip: float,
    act_bits: int,
    weight_bits: int,
    group_size: int,
    w13_bias: torch.Tensor | None = None,
    w2_bias: torch.Tensor | None = None,
    activation: str = "silu",
) -> torch.Tensor:
    """:func:`reference.experts` by the ops of the device: codes and integer sums bit for bit, sums
    over experts in its order.

    Args:
        library: the namespace of the ops.
        x, weights, chosen, w13, w13_scale, w2, w2_scale, clip: as for :func:`ops.experts`.
        act_bits, weight_bits, group_size, w13_bias, w2_bias, activation: as there.
        block: as there; it must have been prepared for the device.

    Returns:
        ``(T, N)`` in the dtype of ``x``.

    Raises:
        RuntimeError: an argument has another dtype, shape or range; the message names it.
    """
    route = Route.of(chosen, len(w13))
    numbers = (act_bits, weight_bits, group_size)
    codes, scale = library.quant(x, clip, act_bits)
    first = (codes[route.token], scale[route.token], w13, w13_scale, w13_bias)
    both = library.gemm_experts(*first, route.tiles, x.dtype, *numbers)
    own = getattr(library, _ACTIVATIONS[activation])(both, block, clip, act_bits)
    down = library.gemm_experts(*own, w2, w2_scale, w2_bias, route.tiles, torch.float32, *numbers)
    return library.combine_experts(down, route.sources, weights.gather(1, route.slots), x.dtype)
