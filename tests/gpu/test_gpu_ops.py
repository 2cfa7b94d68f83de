# SPDX-License-Identifier: Apache-2.0
"""Every op on a GPU, bit for bit what smoothrot_vllm/reference.py defines."""

from ops_contract import OpsContract

from smoothrot_vllm.hadamard import MAX_BASE, factorize

BASES = [base for base in range(1, MAX_BASE + 1) if (f := factorize(8 * base)) is not None and f.base == base > 1]
POWERS = [32 << i for i in range(11)]


class TestSmallOps(OpsContract):
    """The contract's own shapes, ragged ones among them: what the sanitizer runs."""


class TestOps(OpsContract):
    """Shapes of models, and every Hadamard order."""

    inputs = (4096, 14336, 32768)
    rotations = (
        *((power, power) for power in POWERS),
        *((8 * base, 8 * base) for base in BASES),
        *((32 * base, 16 * base) for base in BASES),
        (4096, 128),
        (8192, 8192),
        (11008, 11008),
        (14336, 14336),
        (18944, 18944),
        (28672, 28672),
    )
    # Every tile of both CUTLASS families, tokens and outputs that no tile divides, outputs that 8 does not divide.
    gemms = (
        (1, 6144, 4096),
        (8, 4096, 14336),
        (16, 1001, 4096),
        (17, 4096, 4096),
        (33, 1000, 4128),
        (65, 6144, 4096),
        (129, 14336, 4096),
        (300, 1001, 4096),
        (513, 4096, 4096),
        (2047, 4096, 1024),
    )
    groups = ((1, 4096, 4096, 32), (16, 4096, 4096, 128), (130, 1000, 4096, 32))
