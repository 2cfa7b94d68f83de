# SPDX-License-Identifier: Apache-2.0
"""The smoothing policies that an analysis compares, chosen for one down_proj."""

from dataclasses import dataclass, field
from typing import Literal, get_args

import torch

from smoothrot_offline.calibrate import ChannelStatistics
from smoothrot_offline.smooth import smoothing_scales

Policy = Literal["max"]
POLICIES: tuple[Policy, ...] = get_args(Policy)
ALPHA = 0.5
"""Of SmoothRot (arXiv 2506.05413)."""


@dataclass(frozen=True)
class PolicyChoice:
    """Scales, float64 ``(f,)``; the numbers that the policy chose them by; and where an optimised policy started."""

    scales: torch.Tensor
    choice: dict[str, float] = field(default_factory=dict)
    start: torch.Tensor | None = None


def choose(policy: Policy, statistics: ChannelStatistics, down_weight: torch.Tensor) -> PolicyChoice:
    """Scales of ``policy`` for a down_proj of float64 weight ``(hidden, f)``."""
    return PolicyChoice(smoothing_scales(statistics, down_weight, ALPHA), {"alpha": ALPHA})
