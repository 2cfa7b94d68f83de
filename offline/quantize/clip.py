# SPDX-License-Identifier: Apache-2.0
"""Weight scales by clip search: the shrink of the largest magnitude that loses the least in the
L2.4 norm.

The search of GPTQ and QuaRot (arXiv 2404.00456, section 4) tries every shrink on every weight. Here
each row is counted once into a histogram of ``w / max|w|``, and one matrix product of the counts
with a
precomputed table of errors scores all shrinks at once: the cost per weight no longer depends on the
grid. Only the choice of the scale sees the bins (at least 36 to a quantisation step); codes are
rounded from the exact weights.
"""

from functools import lru_cache

import torch

from smoothrot_vllm.reference import QUANT_MIN_SCALE, quant_max

ERROR_NORM = 2.4
SHRINKS = tuple(1 - i / 100 for i in range(80))
"""Candidate scales, as fractions of the scale that represents the largest magnitude exactly."""

_CHUNK_VALUES = 1 << 20
_LONG_ROW = 512


def clip_search_scale(rows: torch.Tensor, bits: int) -> torch.Tensor:
    """Scale of a symmetric quantiser for each row.

    8 bits take the largest magnitude as it is: with 255 levels a clipped outlier costs more than
    finer rounding of the rest gains, for any row of less than some 10^5 weights.

    Args:
        rows: finite float32 or float64 ``(R, K)``, one row per scale (an output channel or a
            group).
        bits: 4 or 8.

    Returns:
        float32 ``(R,)``, positive; 1 for a row whose scale would fall below ``QUANT_MIN_SCALE``.
    """
    chunk = max(1, _CHUNK_VALUES // rows.shape[1])
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
