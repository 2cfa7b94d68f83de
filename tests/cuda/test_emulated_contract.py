# SPDX-License-Identifier: Apache-2.0
"""The tests of tests/gpu on the make-believe GPU, where its kernels are emulated."""

import pytest
from emulated_ops import emulated_target
from ops_contract import OpsContract, Target


@pytest.fixture(params=[80, 90, 120])
def target(request: pytest.FixtureRequest) -> Target:
    return emulated_target(request.param)


class TestEmulatedOps(OpsContract):
    """On the contract's own small shapes."""
