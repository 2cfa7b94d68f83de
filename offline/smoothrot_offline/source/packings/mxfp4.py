# SPDX-License-Identifier: Apache-2.0
"""MXFP4 (OCP Microscaling Formats, version 1.0) as gpt-oss stores it: codes of four bits, a scale
of eight for each 32 of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from smoothrot_offline.source.packings.packed import Layout, Packing, Shape

if TYPE_CHECKING:
    import torch

_BYTES = ("U8",)
_BLOCK_BYTES = 16
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""What codes 0 to 7 are worth; with the highest bit set, they are negative."""


class Mxfp4(Packing):
    """``blocks (out, groups, 16)``, two E2M1 codes of neighbouring inputs to a byte, the first in
    the lower bits; ``scales (out, groups)``, E8M0. What they are worth is exact in bfloat16, but
    next to the ends of its range."""

    title = "MXFP4"
    roles = ("blocks", "scales")
    dimensions = 3

    def layout(self, there: Mapping[str, Shape]) -> Layout:
        """See :class:`Packing`."""
        out, groups, _ = there["blocks"]
        return Layout(
            (out, groups * 2 * _BLOCK_BYTES),
            {"blocks": (_BYTES, (out, groups, _BLOCK_BYTES)), "scales": (_BYTES, (out, groups))},
        )

    def unpack(self, name: str, parts: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """See :class:`Packing`."""
        import torch

        blocks = parts["blocks"]
        codes = torch.stack((blocks & 0xF, blocks >> 4), dim=-1).flatten(-2)
        values = torch.tensor([*_E2M1, *(-value for value in _E2M1)])[codes.int()]
        scales = parts["scales"].view(torch.float8_e8m0fnu).float()
        return (values * scales[..., None]).flatten(1)


def parse_mxfp4(quantization: Mapping[str, Any]) -> Packing:
    """The packing of a ``quantization_config`` with quant_method ``mxfp4``. What it leaves in 16
    bits (``modules_to_not_convert``) is seen by the tensors."""
    return Mxfp4()
