# SPDX-License-Identifier: Apache-2.0
"""The binding of the CUDA ops built for a make-believe GPU, and nvcc where it is installed."""

import sys
from typing import Any

import pytest
import torch
from emulated_ops import emulated_target
from tiny_models import REPOSITORY

sys.path.insert(0, str(REPOSITORY / "csrc" / "cuda"))
sys.path.insert(0, str(REPOSITORY / "csrc" / "emulator"))


@pytest.fixture
def gpu() -> Any:
    """The emulated ops on what they take for an A100."""
    torch.manual_seed(0)
    return emulated_target(80, multiprocessors=108).ops
