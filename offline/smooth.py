# SPDX-License-Identifier: Apache-2.0
"""Smoothing scales of down_proj's input (S), and their fold into the layer. They come before R4."""

import torch

from smoothrot_offline.architectures import Architecture
from smoothrot_offline.calibrate import ChannelStatistics
from smoothrot_vllm.errors import CheckpointError


def smoothing_scales(statistics: ChannelStatistics, down_weight: torch.Tensor, alpha: float) -> torch.Tensor:
    """``s_j = max|X_j|^alpha / max|W_j|^(1 - alpha)`` (SmoothRot, arXiv 2506.05413, equation 4).

    The weight's maximum is that of its magnitudes; the paper's code takes the signed one. A channel that is
    zero in the weight or was never seen non-zero keeps its scale of 1.

    Args:
        statistics: of down_proj's input ``X (tokens, f)`` in the original model.
        down_weight: W, float64 ``(hidden, f)``.
        alpha: share of the difficulty moved to the weight, 0 to 1.

    Returns:
        Float64 ``(f,)``, positive and finite.
    """
    activation = statistics.largest.double()
    weight = down_weight.abs().amax(dim=0)
    scales = activation.pow(alpha) / weight.pow(1 - alpha)
    return torch.where((activation > 0) & (weight > 0), scales, 1.0)


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
