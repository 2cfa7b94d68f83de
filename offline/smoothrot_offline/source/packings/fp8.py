# SPDX-License-Identifier: Apache-2.0
"""FP8 weights with scales for blocks, for output channels, or one for all."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

from smoothrot_offline.source.packings.packed import (
    FLOATS,
    Layout,
    Packing,
    Shape,
    unsupported,
)

if TYPE_CHECKING:
    import torch

FP8 = "F8_E4M3"
DYNAMIC = (
    "the source quantizes activations as it computes them, which says nothing of its weights: the"
    " output's activations are quantized as the options say"
)
"""Note of a source whose activations are quantized without a stored scale."""

Scales = Literal["channel", "tensor"] | tuple[int, int]
"""What one scale is of: a row, the weight, or a block of so many rows and columns."""


class Fp8(Packing):
    """``weight (out, in)`` and what multiplies it: ``weight_scale`` or ``weight_scale_inv``, the
    same by another name, of shape ``(ceil(out / rows), ceil(in / columns))`` for blocks, ``(out,
    1)`` for channels, ``(1,)`` or ``()`` for the whole."""

    title = "FP8"
    roles = ("weight", "weight_scale", "weight_scale_inv")
    dtype = FP8

    def __init__(self, scales: Scales, dynamic: bool) -> None:
        self.scales = scales
        self.notes = (DYNAMIC,) if dynamic else ()

    def layout(self, there: Mapping[str, Shape]) -> Layout:
        """See :class:`Packing`."""
        shape = there["weight"]
        role = "weight_scale" if "weight_scale" in there else "weight_scale_inv"
        wanted: Shape
        if isinstance(self.scales, tuple):
            wanted = tuple(-(-size // step) for size, step in zip(shape, self.scales, strict=True))
        elif self.scales == "channel":
            wanted = (shape[0], 1)
        else:
            wanted = () if there.get(role) == () else (1,)
        return Layout(shape, {"weight": ((FP8,), shape), role: (FLOATS, wanted)})

    def unpack(self, name: str, parts: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """See :class:`Packing`."""
        weight = parts["weight"].float()
        scale = next(part for role, part in parts.items() if role != "weight").float()
        if isinstance(self.scales, tuple):
            rows, columns = weight.shape
            scale = scale.repeat_interleave(self.scales[0], 0)[:rows]
            scale = scale.repeat_interleave(self.scales[1], 1)[:, :columns]
        return weight * scale


def block_shape(key: str, found: Any) -> tuple[int, int]:
    """Rows and columns that share a scale.

    Raises:
        UnsupportedModelError: they are no two positive numbers.
    """
    if not (
        isinstance(found, list) and len(found) == 2 and all(type(n) is int and n > 0 for n in found)
    ):
        raise unsupported(key, "two positive numbers", found)
    return found[0], found[1]


def parse_fp8(quantization: Mapping[str, Any]) -> Packing:
    """The packing of a ``quantization_config`` with quant_method ``fp8``.

    Raises:
        UnsupportedModelError: it says something that is not read.
    """
    activations = quantization.get("activation_scheme", "dynamic")
    if activations != "dynamic":
        raise unsupported("activation_scheme", "dynamic, no stored scales", activations)
    for key in ("kv_cache_scheme", "kv_cache_quant_algo"):
        if found := quantization.get(key):
            raise unsupported(key, "none", found)
    block = quantization.get("weight_block_size")
    return Fp8("tensor" if block is None else block_shape("weight_block_size", block), dynamic=True)
