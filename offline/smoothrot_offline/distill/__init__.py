# SPDX-License-Identifier: Apache-2.0
"""Training of the rounded model as a whole, towards the original's predictions."""
