# SPDX-License-Identifier: Apache-2.0
"""The real GPU. Without one the run ends at once and says what is missing."""

import sys

import pytest
import torch
from gpu_ready import has_cuda_vllm, refusal
from ops_contract import Target
from tiny_models import REPOSITORY

sys.path.insert(0, str(REPOSITORY / "tests" / "e2e"))
collect_ignore = [] if refusal("tests/gpu") or has_cuda_vllm() else ["test_gpu_serving.py"]


def pytest_configure() -> None:
    """Asked for by name where they cannot run: exit status 2."""
    reason = refusal("tests/gpu")
    if reason is not None:
        pytest.exit(reason, returncode=2)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Name what could not be collected."""
    for name in collect_ignore:
        terminalreporter.write_line(f"left out: {name}: it needs the CUDA wheel of vLLM, pip install 'vllm==0.32.0'")


@pytest.fixture(scope="session")
def capability() -> int:
    major, minor = torch.cuda.get_device_capability()
    return 10 * major + minor


@pytest.fixture(scope="session")
def target() -> Target:
    from smoothrot_vllm import ops

    device = torch.device("cuda", torch.cuda.current_device())
    return Target(torch.ops.smoothrot, device, torch.device("cpu"), lambda block: ops.prepare_rotation(block, device))
