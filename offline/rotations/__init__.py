# SPDX-License-Identifier: Apache-2.0
"""Learned rotations: orthogonal matrices for R1 and R2 of a smaller layer error than the
Hadamard ones they start from."""

from smoothrot_offline.rotations.cayley import Learned
from smoothrot_offline.rotations.heads import learn_head_rotations
from smoothrot_offline.rotations.residual import ReaderSample, learn_residual_rotation

__all__ = ["Learned", "ReaderSample", "learn_head_rotations", "learn_residual_rotation"]
