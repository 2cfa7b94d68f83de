# SPDX-License-Identifier: Apache-2.0
"""Smoothing (S): how large each channel of an input is, which scales even it out, and their fold
into the layer."""

from smoothrot_offline.smooth.fold import LayerScales, fold_norm_smoothing, fold_smoothing
from smoothrot_offline.smooth.layer_error import LayerError
from smoothrot_offline.smooth.policies import PolicyOptions, SmoothingChoice, choose_scales
from smoothrot_offline.smooth.statistics import InputStatistics

__all__ = [
    "InputStatistics",
    "LayerError",
    "LayerScales",
    "PolicyOptions",
    "SmoothingChoice",
    "choose_scales",
    "fold_norm_smoothing",
    "fold_smoothing",
]
