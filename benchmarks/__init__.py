# SPDX-License-Identifier: Apache-2.0
"""Measurements. Each runs from the repository's root as ``python -m benchmarks.FOLDER.NAME``."""
