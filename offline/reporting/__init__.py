# SPDX-License-Identifier: Apache-2.0
"""``smoothrot-convert report``: perplexity, task scores, size and speed of several directories
side by side."""

from smoothrot_offline.reporting.record import Report, ReportConfig
from smoothrot_offline.reporting.run import compare

__all__ = ["Report", "ReportConfig", "compare"]
