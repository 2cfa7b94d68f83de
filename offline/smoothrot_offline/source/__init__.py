# SPDX-License-Identifier: Apache-2.0
"""The original model: open, validate, stream, run a layer at a time."""
