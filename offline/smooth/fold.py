# SPDX-License-Identifier: Apache-2.0
"""The fold of smoothing scales (S) into a layer. It comes before R4."""

import torch

from smoothrot_offline.architectures import Architecture
from smoothrot_offline.rotate import scale_up
from smoothrot_vllm.errors import CheckpointError


def fold_smoothing(layer: dict[str, torch.Tensor], table: Architecture, scales: torch.Tensor) -> None:
    """Divide down_proj's input by ``scales`` in up_proj's rows and bias, and multiply it back in down_proj's columns.

    Args:
        layer: tensors by names relative to the layer, float64; changed.
        table: the family, with its experts written out.
        scales: float64 ``(f,)``, or ``(experts, f)``.

    Raises:
        CheckpointError: a scale is zero, negative or not finite.
    """
    if not (scales.isfinite() & (scales > 0)).all():
        raise CheckpointError(f"smoothing scales of {table.down}: expected positive finite numbers. Check the calibration text.")
    for (up, down), own in zip(table.products, scales.view(len(table.products), -1), strict=True):
        scale_up(layer, up, 1 / own)
        layer[f"{down}.weight"] = layer[f"{down}.weight"] * own
