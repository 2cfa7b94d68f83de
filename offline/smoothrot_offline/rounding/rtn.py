# SPDX-License-Identifier: Apache-2.0
"""Round-to-nearest (RTN) weight quantization with searched scales, and the quantizers with a
gradient: rounding passes it straight through (STE), clamping stops it."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from smoothrot_offline.rounding.scales import search_scales
from smoothrot_vllm.errors import CheckpointError
from smoothrot_vllm.format import (
    GROUP_SCALE_MAX,
    WEIGHT_GROUP_SCALE,
    WEIGHT_PACKED,
    WEIGHT_SCALE,
    ActivationScheme,
    WeightScheme,
    weight_tensors,
)
from smoothrot_vllm.reference import (
    QUANT_MIN_SCALE,
    encode,
    pack_group_scale,
    quant_max,
    scaled_codes,
)

HEAD_ROWS = 4096
"""Rows of the embedding and of the head that are held in float64 at a time."""
_CHUNK_VALUES = 1 << 22


@dataclass(frozen=True)
class QuantizedWeight:
    """A quantized linear weight ``code * group_scale * scale``: int8 ``codes (N, K)``, float32
    ``scale (N, 1)`` and, of G groups of K/G consecutive inputs, uint8 ``group_scale (N, G)``."""

    codes: torch.Tensor
    scale: torch.Tensor
    group_scale: torch.Tensor | None = None

    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The weight the codes stand for, ``(N, K)``."""
        # One code a byte, as 8-bit ones are stored.
        whole = scaled_codes(self.codes, self.group_scale, bits=8)
        return whole.to(dtype) * self.scale.to(dtype)


def quantize_rtn(
    weight: torch.Tensor, scheme: WeightScheme, name: str = "weight"
) -> QuantizedWeight:
    """Quantize by rounding each weight to the nearest code (ties to even) of searched scales.

    Args:
        weight: ``(N, K)``, any float dtype; computed in float32 a few rows at a time.
        scheme: bits and group size.
        name: the tensor's name, for messages.

    Raises:
        ConfigError: K does not fit the scheme.
        CheckpointError: the weight holds a NaN or an infinity.
    """
    check_weight(weight, scheme, name)
    scales = search_scales(weight, scheme)
    steps, top = scales.steps, quant_max(scheme.bits)
    codes = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    chunk = max(1, _CHUNK_VALUES // weight.shape[1])
    for start in range(0, weight.shape[0], chunk):
        rows = slice(start, start + chunk)
        grouped = weight[rows].float().unflatten(1, (steps.shape[1], -1))
        codes[rows] = (grouped / steps[rows, :, None]).round_().clamp_(-top - 1, top).flatten(1)
    return QuantizedWeight(codes, *scales)


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


def round_through(x: torch.Tensor) -> torch.Tensor:
    """``x`` rounded to nearest, ties to even; the gradient is that of ``x``."""
    rounded: torch.Tensor = _RoundThrough.apply(x)
    return rounded


def fake_quantize(x: torch.Tensor, scale: torch.Tensor, bits: int) -> torch.Tensor:
    """``scale * clamp(round(x / scale))``, differentiable in both; ``scale`` broadcasts against
    ``x``."""
    top = quant_max(bits)
    return round_through(x / scale).clamp(-top - 1, top) * scale


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


@dataclass(frozen=True)
class Shrink:
    """Scales relative to the weight they were searched for: ``channel (N, 1)`` over the largest
    magnitude of the row, and the steps of its groups over theirs, ``group (N, G)``, or None."""

    channel: torch.Tensor
    group: torch.Tensor | None


def searched_shrink(weight: torch.Tensor, scheme: WeightScheme) -> Shrink:
    """What the search makes of the scales of a weight ``(N, K)``."""
    scales = search_scales(weight, scheme)
    channel = scales.scale / _largest_magnitude(weight, 1).clamp_min(QUANT_MIN_SCALE)
    if scales.group_scale is None:
        return Shrink(channel, None)
    largest = _largest_magnitude(weight, scales.group_scale.shape[1])
    return Shrink(channel, scales.steps / largest.clamp_min(QUANT_MIN_SCALE))


def fake_quantize_shrunk(weight: torch.Tensor, shrink: Shrink, bits: int) -> torch.Tensor:
    """A weight ``(N, K)`` quantized with scales that are the given fractions of its largest
    magnitudes, those of groups rounded to whole multiples of the row's.

    Of the weight that was searched it is what ``QuantizedWeight.dequantize`` gives.
    """
    steps = (_largest_magnitude(weight, 1) * shrink.channel).clamp_min(QUANT_MIN_SCALE)
    if shrink.group is not None:
        wanted = _largest_magnitude(weight, shrink.group.shape[1]) * shrink.group
        steps = steps * round_through(wanted / steps).clamp(1, GROUP_SCALE_MAX)
    grouped = weight.unflatten(1, (steps.shape[1], -1))
    return fake_quantize(grouped, steps[:, :, None], bits).flatten(1)


def _largest_magnitude(weight: torch.Tensor, groups: int) -> torch.Tensor:
    """``max |w|`` of each row's groups, ``(N, groups)``."""
    return weight.unflatten(1, (groups, -1)).abs().amax(dim=2)


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
    packed, scale = stored[f"{name}.{WEIGHT_PACKED}"], stored[f"{name}.{WEIGHT_SCALE}"]
    row, error, norm = 0, 0.0, 0.0
    for weight, quantized in parts:
        error += float((weight - quantized.dequantize()).square().sum())
        norm += float(weight.square().sum())
        rows = slice(row, row := row + len(weight))
        packed[rows], scale[rows] = encode(quantized.codes, scheme.bits), quantized.scale
        if quantized.group_scale is not None:
            stored[f"{name}.{WEIGHT_GROUP_SCALE}"][rows] = pack_group_scale(quantized.group_scale)
    return stored, relative_error(error, norm)


def relative_error(error: float, norm: float) -> float:
    """``|W - Q(W)| / |W|`` from the squares of both; 0 for a linear that is all zeros, which its
    codes are too."""
    return (error / norm) ** 0.5 if norm else 0.0
