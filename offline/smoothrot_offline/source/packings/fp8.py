# SPDX-License-Identifier: Apache-2.0
"""FP8 weights with a scale for each block of rows and columns."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

from smoothrot_offline.source.packings.packed import Layout, Packing, Shape, unsupported

if TYPE_CHECKING:
    import torch

FP8 = "F8_E4M3"


class BlockFp8(Packing):
    """``weight (out, in)`` and ``weight_scale_inv (ceil(out / rows), ceil(in / columns))``, which
    multiplies it."""

    title = "FP8"
    roles = ("weight", "weight_scale_inv")
    dtype = FP8

    def __init__(self, block: tuple[int, int]) -> None:
        self.block = block

    def layout(self, stored: Shape, roles: Collection[str]) -> Layout:
        """See :class:`Packing`."""
        blocks = tuple(-(-size // step) for size, step in zip(stored, self.block, strict=True))
        return Layout(
            stored, {"weight": ((FP8,), stored), "weight_scale_inv": (("F32", "BF16"), blocks)}
        )

    def unpack(self, name: str, parts: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """See :class:`Packing`."""
        weight, scale = parts["weight"], parts["weight_scale_inv"]
        rows, columns = weight.shape
        spread = (
            scale.float()
            .repeat_interleave(self.block[0], 0)[:rows]
            .repeat_interleave(self.block[1], 1)[:, :columns]
        )
        return weight.float() * spread


def parse_fp8(quantization: Mapping[str, Any]) -> Packing:
    """The packing of a ``quantization_config`` with quant_method ``fp8``.

    Raises:
        UnsupportedModelError: the scales are not per block.
    """
    found = quantization.get("weight_block_size")
    if not (
        isinstance(found, list) and len(found) == 2 and all(type(n) is int and n > 0 for n in found)
    ):
        raise unsupported("weight_block_size", "two positive numbers", found)
    return BlockFp8((found[0], found[1]))
