# SPDX-License-Identifier: Apache-2.0
"""Learning of what is folded into the weights, by the loss of the whole model."""
