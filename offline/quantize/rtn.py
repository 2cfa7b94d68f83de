# SPDX-License-Identifier: Apache-2.0
"""Round-to-nearest (RTN) weight quantisation, per output channel or per group of inputs."""

from dataclasses import dataclass

import torch

from smoothrot_offline.quantize.clip import clip_search_scale
from smoothrot_vllm.errors import CheckpointError
from smoothrot_vllm.format import WeightScheme, weight_tensors
from smoothrot_vllm.reference import quant_max

_CHUNK_VALUES = 1 << 22


@dataclass(frozen=True)
class QuantizedWeight:
    """A quantised linear weight: int8 ``codes (N, K)`` and float32 ``scale (N, G)``, G groups of
    K/G consecutive inputs."""

    codes: torch.Tensor
    scale: torch.Tensor

    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The weight the codes stand for, ``(N, K)``."""
        grouped = self.codes.unflatten(1, (self.scale.shape[1], -1)).to(dtype)
        return (grouped * self.scale[:, :, None].to(dtype)).flatten(1)


def quantize_rtn(
    weight: torch.Tensor, scheme: WeightScheme, name: str = "weight"
) -> QuantizedWeight:
    """Quantise by rounding each weight to the nearest code (ties to even) of a clip-searched scale.

    Args:
        weight: ``(N, K)``, any float dtype; computed in float32 a few rows at a time.
        scheme: bits and group size.
        name: the tensor's name, for messages.

    Raises:
        ConfigError: K does not fit the scheme.
        CheckpointError: the weight holds a NaN or an infinity.
    """
    check_weight(weight, scheme, name)
    scale = weight_scale(weight, scheme)
    top = quant_max(scheme.bits)
    codes = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    chunk = max(1, _CHUNK_VALUES // weight.shape[1])
    for start in range(0, weight.shape[0], chunk):
        rows = slice(start, start + chunk)
        grouped = weight[rows].float().unflatten(1, (scale.shape[1], -1))
        codes[rows] = (grouped / scale[rows, :, None]).round_().clamp_(-top - 1, top).flatten(1)
    return QuantizedWeight(codes, scale)


def weight_scale(weight: torch.Tensor, scheme: WeightScheme) -> torch.Tensor:
    """Clip-searched scales of a weight ``(N, K)``: float32 ``(N, G)``."""
    group = weight.shape[1] if scheme.group_size == -1 else scheme.group_size
    return clip_search_scale(weight.reshape(-1, group), scheme.bits).reshape(weight.shape[0], -1)


def check_weight(weight: torch.Tensor, scheme: WeightScheme, name: str) -> None:
    """Refuse a weight that no code can stand for: see :func:`quantize_rtn` for what is raised."""
    weight_tensors(weight.shape[0], weight.shape[1], scheme)
    if not weight.isfinite().all():
        row, column = (~weight.isfinite()).nonzero()[0].tolist()
        raise CheckpointError(
            f"{name}: expected finite weights, got {weight[row, column].item()} at row {row},"
            f" column {column}. The source checkpoint is damaged: fetch it again."
        )
