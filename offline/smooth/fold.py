# SPDX-License-Identifier: Apache-2.0
"""The fold of smoothing scales (S) into a layer. It comes before R4."""

import torch

from smoothrot_offline.architectures import Architecture
from smoothrot_vllm.errors import CheckpointError


def fold_smoothing(layer: dict[str, torch.Tensor], table: Architecture, scales: torch.Tensor) -> None:
    """Divide down_proj's input by ``scales`` in up_proj's rows and bias, and multiply it back in down_proj's columns.

    Raises:
        CheckpointError: a scale is zero, negative or not finite.
    """
    if not (scales.isfinite() & (scales > 0)).all():
        raise CheckpointError(f"smoothing scales of {table.down}: expected positive finite numbers. Check the calibration text.")
    layer[f"{table.up}.weight"] = layer[f"{table.up}.weight"] / scales[:, None]
    if f"{table.up}.bias" in layer:
        layer[f"{table.up}.bias"] = layer[f"{table.up}.bias"] / scales
    layer[f"{table.down}.weight"] = layer[f"{table.down}.weight"] * scales
