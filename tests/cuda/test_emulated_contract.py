# SPDX-License-Identifier: Apache-2.0
"""The tests of tests/gpu on the make-believe GPU, where its kernels are emulated."""

import pytest
import torch
from emulated_ops import emulated_target
from kernel_contract import NAMES, KernelContract
from ops_contract import OpsContract, Target


@pytest.fixture(params=[80, 90, 120])
def capability(request: pytest.FixtureRequest) -> int:
    number: int = request.param
    return number


@pytest.fixture
def target(capability: int) -> Target:
    return emulated_target(capability)


class TestEmulatedOps(OpsContract):
    """On the contract's own small shapes."""


class TestEmulatedKernels(KernelContract):
    """Every kernel and tile by its name; the emulator takes a second for a wide row, so there is
    one of each."""

    tokens = (1, 17)
    shapes = ((136, 160),)
    row_count = 1
    row_dtypes = (torch.bfloat16,)

    def test_the_forced_kernels_are_all_that_the_library_has(self, target: Target) -> None:
        assert set(target.ops.cuda_kernels().split()) == NAMES
