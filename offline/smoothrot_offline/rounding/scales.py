# SPDX-License-Identifier: Apache-2.0
"""Search for weight scales: a float for each row, and in groups an integer for each group too."""

from functools import lru_cache
from typing import NamedTuple

import torch

from smoothrot_vllm.format import GROUP_SCALE_MAX, WeightScheme
from smoothrot_vllm.reference import QUANT_MIN_SCALE, quant_max

ERROR_NORM = 2.4
SHRINKS = tuple(1 - i / 100 for i in range(80))
"""Candidate scales of a row, as fractions of the scale that represents its largest magnitude
exactly."""
LEVELS_PER_UNIT = 8
LEVELS = tuple((i + 1) / LEVELS_PER_UNIT for i in range(21 * LEVELS_PER_UNIT))
"""Steps of a group whose errors are tabulated, as the number of steps in its largest magnitude; at
the first everything rounds to zero, at the last two thirds of it are clipped."""
CHANNEL_CANDIDATES = tuple(2 ** (i / 24) for i in range(-6, 10))
"""Candidate scales of a row in groups, as multiples of the one whose largest group scale is the
largest step that a group would choose alone."""

_CHUNK_VALUES = 1 << 20
_LONG_ROW = 512
_GROUP_HALF = 128
_FEWEST_LEVELS = 3 * LEVELS_PER_UNIT
"""Index of the coarsest step that a group would choose alone; one that is all zeros chooses it."""


class WeightScales(NamedTuple):
    """Scales of a weight ``(N, K)``: float32 ``scale (N, 1)`` and, of G groups of K/G consecutive
    inputs, uint8 ``group_scale (N, G)`` from 1 to ``GROUP_SCALE_MAX``, or None."""

    scale: torch.Tensor
    group_scale: torch.Tensor | None

    @property
    def steps(self) -> torch.Tensor:
        """What a code of 1 stands for: float32 ``(N, G)``, or ``(N, 1)`` without groups."""
        return self.scale if self.group_scale is None else self.scale * self.group_scale


def search_scales(weight: torch.Tensor, scheme: WeightScheme) -> WeightScales:
    """Scales of least L2.4 rounding error of each row, among the candidates.

    8 bits take the largest magnitude as it is: with 255 levels a clipped outlier costs more than
    finer rounding of the rest gains, for any row of less than some 10^5 weights.

    Args:
        weight: finite float32 or float64 ``(N, K)``; computed in float32 a few rows at a time.
        scheme: bits and group size; the latter divides K.

    Returns:
        Scales; 1 for a row whose largest magnitude over the largest code is below
        ``QUANT_MIN_SCALE``.
    """
    rows = weight.split(max(1, _CHUNK_VALUES // weight.shape[1]))
    if scheme.group_size == -1:
        alone = [_channel_scale(part.float(), scheme.bits) for part in rows]
        return WeightScales(torch.cat(alone), None)
    found = [_joint_search(part.float(), scheme.group_size) for part in rows]
    scales, group_scales = zip(*found, strict=True)
    return WeightScales(torch.cat(scales), torch.cat(group_scales))


def _channel_scale(rows: torch.Tensor, bits: int) -> torch.Tensor:
    """Scale of each of float32 ``rows (R, K)``, ``(R, 1)``."""
    top = quant_max(bits)
    largest = rows.abs().amax(dim=1, keepdim=True)
    scale = largest / top
    empty = scale < QUANT_MIN_SCALE
    if bits == 4:
        largest = torch.where(empty, 1.0, largest)
        half = 1024 if rows.shape[1] >= _LONG_ROW else 256
        levels = tuple(top / shrink for shrink in SHRINKS)
        best = _errors(rows / largest, half, levels).argmin(dim=1, keepdim=True)
        scale = scale * torch.tensor(SHRINKS, device=rows.device)[best]
    return torch.where(empty, 1.0, scale)


def _joint_search(rows: torch.Tensor, group_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Scales ``(R, 1)`` and uint8 group scales ``(R, G)`` of float32 ``rows (R, K)``.

    For each candidate of a row's scale each group takes the integer of least error next to the
    quotient of the step that it would choose alone; the candidate of least error of the row wins.
    """
    groups = rows.unflatten(1, (-1, group_size))
    largest = groups.abs().amax(dim=2)
    row_largest = largest.amax(dim=1, keepdim=True)
    empty = row_largest / quant_max(4) < QUANT_MIN_SCALE
    row_largest = torch.where(empty, 1.0, row_largest)
    unit = groups / torch.where(largest > 0, largest, 1.0)[:, :, None]
    errors = _errors(unit.flatten(0, 1), _GROUP_HALF, LEVELS).unflatten(0, largest.shape)
    errors *= (largest / row_largest).pow(ERROR_NORM)[:, :, None]

    alone = errors[:, :, _FEWEST_LEVELS:].argmin(dim=2) + _FEWEST_LEVELS
    wanted = largest / torch.tensor(LEVELS, device=rows.device)[alone]
    base = wanted.amax(dim=1, keepdim=True) / GROUP_SCALE_MAX
    base = torch.where(empty, 1.0, base)
    neighbors = torch.arange(-1, 2, device=rows.device)
    best = torch.full_like(base, torch.inf)
    scale, group_scale = torch.ones_like(base), torch.ones_like(wanted)
    for candidate in CHANNEL_CANDIDATES:
        channel = base * candidate
        tried = ((wanted / channel).round()[:, :, None] + neighbors).clamp_(1, GROUP_SCALE_MAX)
        levels = (largest / channel * LEVELS_PER_UNIT)[:, :, None] / tried
        found = errors.gather(2, levels.round_().long().clamp_(1, len(LEVELS)) - 1)
        error, choice = found.min(dim=2)
        total = error.sum(dim=1, keepdim=True)
        better = total < best
        best = torch.where(better, total, best)
        scale = torch.where(better, channel, scale)
        chosen = tried.gather(2, choice[:, :, None]).squeeze(2)
        group_scale = torch.where(better, chosen, group_scale)
    scale, group_scale = torch.where(empty, 1.0, scale), torch.where(empty, 1.0, group_scale)
    return scale, group_scale.to(torch.uint8)


def _errors(unit_rows: torch.Tensor, half: int, levels: tuple[float, ...]) -> torch.Tensor:
    """L2.4 error of each row of values in [-1, 1], held in ``2 * half`` bins, for each number of
    4-bit steps in 1: float32 ``(R, len(levels))``."""
    bins = unit_rows.add(1).mul_(half).long().clamp_(max=2 * half - 1)
    counts = torch.zeros(unit_rows.shape[0], 2 * half, device=unit_rows.device)
    counts.scatter_add_(1, bins, counts.new_ones(()).expand(bins.shape))
    return counts @ _error_table(half, levels, counts.device)


@lru_cache(maxsize=4)
def _error_table(half: int, levels: tuple[float, ...], device: torch.device) -> torch.Tensor:
    """``|Q(c) - c|^2.4`` for each bin centre c in [-1, 1] and each number of steps in 1: float32
    ``(2 * half, len(levels))``."""
    top = quant_max(4)
    centres = (torch.arange(2 * half, dtype=torch.float64)[:, None] + 0.5) / half - 1
    scales = 1 / torch.tensor(levels, dtype=torch.float64)
    rounded = (centres / scales).round().clamp(-top - 1, top) * scales
    return (rounded - centres).abs().pow(ERROR_NORM).float().to(device)
