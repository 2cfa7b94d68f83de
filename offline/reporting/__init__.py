# SPDX-License-Identifier: Apache-2.0
"""``smoothrot-convert report``: perplexity, task scores, size and speed of several directories side by side."""

from smoothrot_offline.reporting.compare import compare
from smoothrot_offline.reporting.record import Report, ReportConfig

__all__ = ["Report", "ReportConfig", "compare"]
