# SPDX-License-Identifier: Apache-2.0
"""``smoothrot-convert analyze``: how hard each layer of a model is to quantise, before and after
each transform."""

from smoothrot_offline.analysis.record import Analysis, AnalysisConfig
from smoothrot_offline.analysis.run import analyze

__all__ = ["Analysis", "AnalysisConfig", "analyze"]
