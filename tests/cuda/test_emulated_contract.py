# SPDX-License-Identifier: Apache-2.0
"""The tests of tests/gpu on the make-believe GPU, where its kernels are emulated."""

from typing import Any

import pytest
import torch
from kernel_contract import NAMES, KernelContract
from ops_contract import OpsContract, Target

from smoothrot_vllm.hadamard import base_matrix, factorize


@pytest.fixture(params=[80, 90, 120])
def capability(request: pytest.FixtureRequest) -> int:
    number: int = request.param
    return number


@pytest.fixture
def target(capability: int, emulated_library: Any) -> Target:
    emulated_library.pretend(capability, 1, 99 * 1024)

    def prepare(block: int) -> int:
        factors = factorize(block)
        assert factors is not None
        emulated_library.prepare_cuda_rotation(base_matrix(factors.base), factors.power, -1)
        return block

    return Target(emulated_library, torch.device("cpu"), torch.device("meta"), prepare)


class TestEmulatedOps(OpsContract):
    """On the contract's own small shapes."""


class TestEmulatedKernels(KernelContract):
    """Every kernel and tile by its name; the emulator takes a second for a wide row, so there is one of each."""

    tokens = (1, 17)
    shapes = ((136, 160),)
    row_count = 1
    row_dtypes = (torch.bfloat16,)

    def test_the_forced_kernels_are_all_that_the_library_has(self, target: Target) -> None:
        assert set(target.ops.cuda_kernels().split()) == NAMES
