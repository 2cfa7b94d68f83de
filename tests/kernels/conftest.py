# SPDX-License-Identifier: Apache-2.0
"""Runs a test on every instruction-set path that this CPU has."""

from collections.abc import Iterator

import pytest
import torch

from smoothrot_vllm import ops
from smoothrot_vllm.errors import UnsupportedPlatformError

PATHS = ["avx512_vnni", "avx2", "portable"]


@pytest.fixture(params=PATHS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """The path the ops run on during this test."""
    try:
        ops.select_kernel(request.param)
    except UnsupportedPlatformError as error:
        assert request.param != "portable"
        pytest.skip(str(error))
    yield request.param
    ops.select_kernel("")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
