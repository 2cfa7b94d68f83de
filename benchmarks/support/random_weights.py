# SPDX-License-Identifier: Apache-2.0
"""Random weights of one linear, or of one linear of several experts, as a checkpoint stores
them."""

import math
from dataclasses import dataclass

import torch

from smoothrot_vllm import ops
from smoothrot_vllm.format import (
    GROUP_SCALE_MAX,
    WEIGHT_GROUP_SCALE,
    WEIGHT_PACKED,
    WEIGHT_SCALE,
    WeightScheme,
    group_count,
)
from smoothrot_vllm.reference import dequantize_weight, encode, pack_group_scale, quant_max


@dataclass(frozen=True)
class RandomWeight:
    """``codes``, ``scale`` and ``group_scale`` as docs/format.md has them, but for group scales,
    which have a byte each."""

    codes: torch.Tensor
    scale: torch.Tensor
    group_scale: torch.Tensor | None
    scheme: WeightScheme

    @classmethod
    def of(cls, outputs: int, inputs: int, scheme: WeightScheme, *experts: int) -> "RandomWeight":
        """Codes that are as often positive as negative, and scales that differ up to threefold from
        each other; products with inputs of deviation 1 have about that too.

        A mean other than zero would be a direction of its own that every layer stretches, errors
        included.
        """
        top, rows = quant_max(scheme.bits), (*experts, outputs)
        codes = encode(torch.randint(-top, top + 1, (*rows, inputs), dtype=torch.int8), scheme.bits)
        deviation = math.sqrt(top * (top + 1) / 3 * inputs)
        group_scale = None
        if groups := group_count(inputs, scheme):
            smallest = GROUP_SCALE_MAX // 3
            group_scale = torch.randint(
                smallest, GROUP_SCALE_MAX + 1, (*rows, groups), dtype=torch.uint8
            )
            deviation *= (smallest + GROUP_SCALE_MAX) / 2
        scale = (0.5 + torch.rand(*rows, 1)) / deviation
        return cls(codes, scale, group_scale, scheme)

    def packed(self) -> torch.Tensor:
        """In the kernels' layout."""
        return ops.prepack_weight(self.codes, self.scale, self.group_scale, self.scheme.bits)

    def stored(self) -> dict[str, torch.Tensor]:
        """As a checkpoint has them, by the ends of their names."""
        tensors = {WEIGHT_PACKED: self.codes, WEIGHT_SCALE: self.scale}
        if self.group_scale is not None:
            tensors[WEIGHT_GROUP_SCALE] = pack_group_scale(self.group_scale)
        return tensors

    def dequantized(self) -> torch.Tensor:
        """float32 ``(outputs, inputs)``."""
        return dequantize_weight(self.codes, self.scale, self.group_scale, self.scheme.bits)
