# SPDX-License-Identifier: Apache-2.0
"""The folds of smoothing scales (S) into a layer: at down_proj's input, before R4, and at what
its norms give out."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from smoothrot_offline.architectures import Architecture
from smoothrot_offline.rotate import scale_up
from smoothrot_vllm.errors import CheckpointError


@dataclass(frozen=True)
class LayerScales:
    """Smoothing scales of one decoder layer, float64, positive.

    ``down`` divides down_proj's input, ``(intermediate,)`` or, with experts, ``(experts,
    intermediate)``; or None. ``norms`` divide what each norm named gives out, ``(hidden,)``.
    """

    down: torch.Tensor | None = None
    norms: Mapping[str, torch.Tensor] = field(default_factory=dict)


def fold_smoothing(
    layer: dict[str, torch.Tensor], table: Architecture, scales: torch.Tensor
) -> None:
    """Divide down_proj's input by ``scales`` in up_proj's rows and bias, and multiply it back in
    down_proj's columns.

    Args:
        layer: tensors by names relative to the layer, float64; changed.
        table: the family, with its experts written out.
        scales: float64 ``(f,)``, or ``(experts, f)``.

    Raises:
        CheckpointError: a scale is zero, negative or not finite.
    """
    _check(scales, table.down)
    for (up, down), own in zip(table.products, scales.view(len(table.products), -1), strict=True):
        scale_up(layer, up, 1 / own)
        layer[f"{down}.weight"] = layer[f"{down}.weight"] * own


def fold_norm_smoothing(
    layer: dict[str, torch.Tensor], table: Architecture, scales: Mapping[str, torch.Tensor]
) -> None:
    """Divide what each norm gives out by its ``scales`` in its weight, and multiply it back in the
    columns of its readers.

    Raises:
        CheckpointError: a scale is zero, negative or not finite.
    """
    for norm, divisor in scales.items():
        _check(divisor, norm)
        layer[f"{norm}.weight"] = (
            layer[f"{norm}.weight"] + table.norm_offset
        ) / divisor - table.norm_offset
        for reader in table.readers[norm]:
            layer[f"{reader}.weight"] = layer[f"{reader}.weight"] * divisor


def _check(scales: torch.Tensor, where: str) -> None:
    if not (scales.isfinite() & (scales > 0)).all():
        raise CheckpointError(
            f"smoothing scales of {where}: expected positive finite numbers. Check the calibration"
            " text."
        )
