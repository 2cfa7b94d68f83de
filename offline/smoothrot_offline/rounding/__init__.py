# SPDX-License-Identifier: Apache-2.0
"""From transformed weights to codes: to nearest, or compensated for the error."""
