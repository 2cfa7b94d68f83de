# SPDX-License-Identifier: Apache-2.0
"""The tests of tests/gpu on the make-believe GPU, where its kernels are emulated."""

from typing import Any

import pytest
import torch
from ops_contract import OpsContract, Target

from smoothrot_vllm.hadamard import base_matrix, factorize


@pytest.fixture(params=[80, 90, 120])
def target(request: pytest.FixtureRequest, emulated_library: Any) -> Target:
    emulated_library.pretend(request.param, 1, 99 * 1024)

    def prepare(block: int) -> int:
        factors = factorize(block)
        assert factors is not None
        emulated_library.prepare_cuda_rotation(base_matrix(factors.base), factors.power, -1)
        return block

    return Target(emulated_library, torch.device("cpu"), torch.device("meta"), prepare)


class TestEmulatedOps(OpsContract):
    """On the contract's own small shapes."""
