# SPDX-License-Identifier: Apache-2.0
"""AWQ as AutoAWQ stores it for its GEMM kernel."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from smoothrot_offline.source.packings.packed import (
    FLOATS,
    INT32,
    WORD_BITS,
    Layout,
    Packing,
    Shape,
    check_bits,
    check_group_size,
    count_groups,
    scaled,
    unpack_words,
    unsupported,
)

if TYPE_CHECKING:
    import torch

_BITS = 4
_CODES = WORD_BITS // _BITS
_PLACES = [0, 4, 1, 5, 2, 6, 3, 7]
"""Which of a word's codes, from the lowest bits on, is that of its first output, of its second, and
so on."""


class Awq(Packing):
    """``qweight (in, out / 8)`` and ``qzeros (groups, out / 8)``, words of codes of neighbouring
    outputs, which are not in order; ``scales (groups, out)``."""

    title = f"{_BITS}-bit AWQ"
    roles = ("qweight", "qzeros", "scales")

    def __init__(self, group_size: int) -> None:
        self.group_size = group_size

    def layout(self, there: Mapping[str, Shape]) -> Layout:
        """See :class:`Packing`."""
        stored = there[self.roles[0]]
        inputs, words = stored
        groups = count_groups(inputs, self.group_size)
        return Layout(
            (words * _CODES, inputs),
            {
                "qweight": (INT32, stored),
                "qzeros": (INT32, (groups, words)),
                "scales": (FLOATS, (groups, words * _CODES)),
            },
        )

    def unpack(self, name: str, parts: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """See :class:`Packing`."""
        codes, zeros = (_in_order(parts[role]) for role in ("qweight", "qzeros"))
        return scaled(codes.T, zeros.T, parts["scales"].T, self.group_size)


def _in_order(words: torch.Tensor) -> torch.Tensor:
    """Codes ``(n, out)`` of words ``(n, out / 8)``."""
    return unpack_words(words, _BITS, dim=1).unflatten(1, (-1, _CODES))[:, :, _PLACES].flatten(1)


def parse_awq(quantization: Mapping[str, Any]) -> Packing:
    """The packing of a ``quantization_config`` with quant_method ``awq``.

    Raises:
        UnsupportedModelError: it says something that is not read.
    """
    check_bits("bits", quantization.get("bits", quantization.get("w_bit")), (_BITS,))
    size = quantization.get("group_size", quantization.get("q_group_size"))
    for key in ("version", "format", "checkpoint_format"):
        if (found := quantization.get(key)) is not None and str(found).lower() != "gemm":
            raise unsupported(key, "gemm", found)
    if (found := quantization.get("zero_point", True)) is not True:
        raise unsupported("zero_point", "true", found)
    return Awq(check_group_size("group_size", size))
