# SPDX-License-Identifier: Apache-2.0
"""The real GPU, or with ``--emulated`` a make-believe one. Without either the run ends at once
and says what is missing."""

import sys

import pytest
import torch
from emulated_ops import emulated_target
from ops_contract import Target
from tiny_models import REPOSITORY

from benchmarks.support.gpu_ready import has_cuda_vllm, refusal

sys.path.insert(0, str(REPOSITORY / "tests" / "e2e"))
collect_ignore = [] if refusal("tests/gpu") or has_cuda_vllm() else ["test_gpu_serving.py"]


def pytest_addoption(parser: pytest.Parser) -> None:
    """Known where a test of this folder is named."""
    parser.addoption(
        "--emulated",
        type=int,
        metavar="CAPABILITY",
        help="rehearse on an emulated GPU, of sm_CAPABILITY",
    )


def emulated(config: pytest.Config) -> int | None:
    """Capability of the make-believe GPU, None for the real one."""
    capability: int | None = config.getoption("--emulated", None)
    return capability


def pytest_configure(config: pytest.Config) -> None:
    """Asked for by name where they cannot run: exit status 2."""
    reason = None if emulated(config) else refusal("tests/gpu")
    if reason is not None:
        pytest.exit(reason, returncode=2)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Name what could not be collected."""
    for name in collect_ignore:
        terminalreporter.write_line(
            f"left out: {name}: it needs the CUDA wheel of vLLM, pip install 'vllm==0.32.0'"
        )


@pytest.fixture(scope="session")
def capability(pytestconfig: pytest.Config) -> int:
    make_believe = emulated(pytestconfig)
    if make_believe is not None:
        return make_believe
    major, minor = torch.cuda.get_device_capability()
    return 10 * major + minor


@pytest.fixture(scope="session")
def device(pytestconfig: pytest.Config) -> torch.device:
    """Where plain torch computes."""
    return (
        torch.device("cpu")
        if emulated(pytestconfig)
        else torch.device("cuda", torch.cuda.current_device())
    )


@pytest.fixture(scope="session")
def target(pytestconfig: pytest.Config, capability: int, device: torch.device) -> Target:
    from smoothrot_vllm import ops

    if emulated(pytestconfig):
        return emulated_target(capability)
    return Target(
        torch.ops.smoothrot,
        device,
        torch.device("cpu"),
        lambda block: ops.prepare_rotation(block, device),
    )
