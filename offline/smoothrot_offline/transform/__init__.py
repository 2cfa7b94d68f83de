# SPDX-License-Identifier: Apache-2.0
"""What is folded into the weights: norms, R1, R2, S and R4, as the two sides of each linear."""
