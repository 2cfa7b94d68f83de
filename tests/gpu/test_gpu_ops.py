# SPDX-License-Identifier: Apache-2.0
"""Every op on a GPU, bit for bit what smoothrot_vllm/reference.py defines."""

import re

import pytest
from ops_contract import CLIP, OpsContract, Target, assert_same_codes

from smoothrot_vllm import reference
from smoothrot_vllm.hadamard import MAX_BASE, factorize

BASES = [
    base
    for base in range(1, MAX_BASE + 1)
    if (f := factorize(8 * base)) is not None and f.base == base > 1
]
POWERS = [32 << i for i in range(10)]
# More than 99 KiB of shared memory a row, which is all that a block of sm_86, 89 and 120 can have.
WIDE = [28672, 32768]


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
    )
    # Every tile of both CUTLASS families, tokens and outputs that no tile divides, outputs that 8
    # does not divide.
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
    linears = (
        (1, 4096, 4096),
        (16, 1000, 4096),
        (17, 4096, 4096),
        (129, 4096, 1024),
        (1025, 1024, 1024),
    )
    # Few and many tokens an expert, more experts than rows, top_k of Mixtral and of Qwen3-MoE.
    experts = (
        (1, 8, 64, 2048, 768),
        (4, 2, 8, 1024, 3584),
        (300, 2, 8, 512, 1024),
        (33, 8, 16, 2048, 768),
    )
    groups = (
        (1, 4096, 4096, 32),
        (16, 4096, 14336, 128),
        (130, 1000, 4096, 32),
        (300, 1000, 4096, 64),
        (2047, 14336, 4096, 128),
    )

    @pytest.mark.parametrize("inputs", WIDE)
    def test_a_wide_rotated_row_is_right_or_refused_by_its_bytes(
        self, target: Target, inputs: int
    ) -> None:
        x = target.randn(5, inputs)
        try:
            got = target.ops.hadamard_quant(x, target.prepare(inputs), CLIP, 8)
        except RuntimeError as error:
            refusal = str(error)
        else:
            assert_same_codes(got, reference.hadamard_quant(x, inputs, CLIP, 8))
            return
        named = re.search(r"fit into the (\d+) bytes of shared memory .* which take (\d+)", refusal)
        assert named is not None, refusal
        assert int(named[2]) > int(named[1])
