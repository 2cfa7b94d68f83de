# SPDX-License-Identifier: Apache-2.0
"""Round-to-nearest (RTN) weight quantization with a searched clip, and the quantizers with a
gradient: rounding passes it straight through (STE), clamping stops it."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch

from smoothrot_vllm.errors import CheckpointError
from smoothrot_vllm.format import (
    WEIGHT_PACKED,
    WEIGHT_SCALE,
    ActivationScheme,
    WeightScheme,
    weight_tensors,
)
from smoothrot_vllm.reference import QUANT_MIN_SCALE, encode, quant_max

ERROR_NORM = 2.4
SHRINKS = tuple(1 - i / 100 for i in range(80))
"""Candidate scales, as fractions of the scale that represents the largest magnitude exactly."""

HEAD_ROWS = 4096
"""Rows of the embedding and of the head that are held in float64 at a time."""
_CLIP_CHUNK_VALUES = 1 << 20
_LONG_ROW = 512


def clip_search_scale(rows: torch.Tensor, bits: int) -> torch.Tensor:
    """Scale of a symmetric quantizer for each row.

    8 bits take the largest magnitude as it is: with 255 levels a clipped outlier costs more than
    finer rounding of the rest gains, for any row of less than some 10^5 weights.

    Args:
        rows: finite float32 or float64 ``(R, K)``, one row per scale (an output channel or a
            group).
        bits: 4 or 8.

    Returns:
        float32 ``(R,)``, positive; 1 for a row whose scale would fall below ``QUANT_MIN_SCALE``.
    """
    chunk = max(1, _CLIP_CHUNK_VALUES // rows.shape[1])
    return torch.cat([_chunk_scale(part, bits) for part in rows.split(chunk)])


def _chunk_scale(rows: torch.Tensor, bits: int) -> torch.Tensor:
    rows = rows.float()
    top = quant_max(bits)
    largest = rows.abs().amax(dim=1)
    scale = largest / top
    empty = scale < QUANT_MIN_SCALE
    if bits == 4:
        largest = torch.where(empty, 1.0, largest)
        scale = scale * _best_shrink(rows / largest[:, None], top)
    return torch.where(empty, 1.0, scale)


def _best_shrink(unit_rows: torch.Tensor, top: int) -> torch.Tensor:
    """The element of ``SHRINKS`` with the least error for each row of values in [-1, 1]; the
    largest one on a tie."""
    half = 1024 if unit_rows.shape[1] >= _LONG_ROW else 256
    bins = unit_rows.add(1).mul_(half).long().clamp_(max=2 * half - 1)
    counts = torch.zeros(unit_rows.shape[0], 2 * half, device=unit_rows.device)
    counts.scatter_add_(1, bins, counts.new_ones(()).expand(bins.shape))
    errors = counts @ _error_table(half, top, counts.device)
    return torch.tensor(SHRINKS, device=counts.device)[errors.argmin(dim=1)]


@lru_cache(maxsize=4)
def _error_table(half: int, top: int, device: torch.device) -> torch.Tensor:
    """``|Q(c) - c|^2.4`` for each bin centre c in [-1, 1] and each shrink: float32 ``(2 * half,
    len(SHRINKS))``."""
    centres = (torch.arange(2 * half, dtype=torch.float64)[:, None] + 0.5) / half - 1
    scales = torch.tensor(SHRINKS, dtype=torch.float64) / top
    rounded = (centres / scales).round().clamp(-top - 1, top) * scales
    return (rounded - centres).abs().pow(ERROR_NORM).float().to(device)


_CHUNK_VALUES = 1 << 22


@dataclass(frozen=True)
class QuantizedWeight:
    """A quantized linear weight: int8 ``codes (N, K)`` and float32 ``scale (N, G)``, G groups of
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
    """Quantize by rounding each weight to the nearest code (ties to even) of a clip-searched scale.

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


class _RoundThrough(torch.autograd.Function):
    """Round to nearest, ties to even; the gradient is that of the identity (Bengio et al., arXiv
    1308.3432)."""

    @staticmethod
    def forward(_context: object, x: torch.Tensor) -> torch.Tensor:
        return x.round()

    @staticmethod
    def backward(_context: object, gradient: torch.Tensor) -> torch.Tensor:
        return gradient


def fake_quantize(x: torch.Tensor, scale: torch.Tensor, bits: int) -> torch.Tensor:
    """``scale * clamp(round(x / scale))``, differentiable in both; ``scale`` broadcasts against
    ``x``."""
    top = quant_max(bits)
    rounded: torch.Tensor = _RoundThrough.apply(x / scale)
    return rounded.clamp(-top - 1, top) * scale


def fake_quantize_tokens(
    x: torch.Tensor, scheme: ActivationScheme, clip: torch.Tensor | None = None
) -> torch.Tensor:
    """``x (..., channels)`` as the server quantizes it, per token; the values of
    ``reference.quant`` up to float rounding.

    Args:
        x: float32.
        scheme: bits, and the clip unless another is given.
        clip: a trainable clip, a scalar tensor.
    """
    ratio = (scheme.clip if clip is None else clip) / quant_max(scheme.bits)
    scale = x.abs().amax(dim=-1, keepdim=True) * ratio
    return fake_quantize(x, torch.where(scale < QUANT_MIN_SCALE, 1.0, scale), scheme.bits)


def fake_quantize_weight(weight: torch.Tensor, scale: torch.Tensor, bits: int) -> torch.Tensor:
    """A weight ``(N, K)`` with scales ``(N, G)``, as ``QuantizedWeight.dequantize`` gives it
    back."""
    grouped = weight.unflatten(1, (scale.shape[1], -1))
    return fake_quantize(grouped, scale[:, :, None], bits).flatten(1)


def largest_magnitude(weight: torch.Tensor, groups: int) -> torch.Tensor:
    """``max |w|`` of each row's groups, ``(N, groups)``."""
    return weight.unflatten(1, (groups, -1)).abs().amax(dim=2)


def searched_shrink(weight: torch.Tensor, scheme: WeightScheme) -> torch.Tensor:
    """What the clip search makes of each scale of a weight ``(N, K)``: a fraction of the largest
    magnitude, ``(N, groups)``."""
    scale = weight_scale(weight, scheme)
    return scale / largest_magnitude(weight, scale.shape[1]).clamp_min(QUANT_MIN_SCALE)


def fake_quantize_shrunk(weight: torch.Tensor, shrink: torch.Tensor, bits: int) -> torch.Tensor:
    """A weight ``(N, K)`` quantized with scales that are a given fraction ``shrink (N, groups)``
    of its largest magnitudes."""
    scale = (largest_magnitude(weight, shrink.shape[1]) * shrink).clamp_min(QUANT_MIN_SCALE)
    return fake_quantize_weight(weight, scale, bits)


def store(
    parts: Iterable[tuple[torch.Tensor, QuantizedWeight]],
    shape: Sequence[int],
    scheme: WeightScheme,
    name: str,
) -> tuple[dict[str, torch.Tensor], float]:
    """Stored tensors of the linear of ``shape`` whose rows come in ``parts``, and its relative
    error ``|W - Q(W)| / |W|``."""
    # On the CPU, where it is written from. Allocated first: a small tensor that stays between large
    # ones that go would keep the allocator from using their place again.
    tables = weight_tensors(shape[0], shape[1], scheme)
    stored = {
        f"{name}.{suffix}": torch.empty(size, dtype=dtype)
        for suffix, (size, dtype) in tables.items()
    }
    packed, scales = stored[f"{name}.{WEIGHT_PACKED}"], stored[f"{name}.{WEIGHT_SCALE}"]
    row, error, norm = 0, 0.0, 0.0
    for weight, quantized in parts:
        error += float((weight - quantized.dequantize()).square().sum())
        norm += float(weight.square().sum())
        rows = slice(row, row := row + len(weight))
        packed[rows], scales[rows] = encode(quantized.codes, scheme.bits), quantized.scale
    return stored, relative_error(error, norm)


def relative_error(error: float, norm: float) -> float:
    """``|W - Q(W)| / |W|`` from the squares of both; 0 for a linear that is all zeros, which its
    codes are too."""
    return (error / norm) ** 0.5 if norm else 0.0
