# SPDX-License-Identifier: Apache-2.0
"""Rows that a quantizer must get right at the edges of its input."""

import math

import torch


def awkward_rows(size: int, dtype: torch.dtype) -> torch.Tensor:
    """Ordinary rows, rows of one outlier, ties, zeros, subnormals, the largest and the smallest
    values, NaN and infinities."""
    x = torch.randn(14, size) * torch.logspace(-3, 3, 14)[:, None]
    x[1] = 0.0
    x[2] = 1e-40
    x[3, -1] = math.nan
    x[4, 0] = math.inf
    x[5, size // 2] = -math.inf
    x[6] = torch.randint(-14, 15, (size,)) / 2
    x[6, 0] = 7.0
    x[7] = -0.0
    x[8, 0] = torch.finfo(dtype).max
    x[9] = torch.finfo(dtype).tiny
    x[10] = 0.0
    x[10, size - 1] = -3110.0
    return x.to(dtype)
