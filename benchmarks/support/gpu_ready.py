# SPDX-License-Identifier: Apache-2.0
"""What the GPU tests and benchmarks need of a machine, and what of it is missing."""

import importlib.util
import sys

import torch

NEEDS = """`make gpu-proof` says what a machine lacks and builds the kernels. By hand, with nvcc on
PATH and torch for CUDA:
SMOOTHROT_CUDA=1 pip install --no-build-isolation -e .
What serves needs the CUDA wheel of vLLM as well: pip install 'vllm==0.32.0'."""


def problems() -> list[str]:
    """Why nothing can run on a GPU here; empty if it can."""
    if torch.version.cuda is None:
        return [f"torch {torch.__version__}: expected a CUDA build, got one without CUDA"]
    if not torch.cuda.is_available():
        return [
            f"torch {torch.__version__}: expected an NVIDIA GPU and its driver, torch.cuda finds"
            " none"
        ]
    # Neither name is needed where there is no GPU, and importing the ops loads their library.
    from smoothrot_vllm import ops
    from smoothrot_vllm.errors import UnsupportedPlatformError

    major, minor = torch.cuda.get_device_capability()
    try:
        ops.check_cuda(10 * major + minor)
    except UnsupportedPlatformError as error:
        return [str(error)]
    return []


def refusal(what: str, serving: bool = False) -> str | None:
    """What to tell whoever asked for ``what``, or None if it can run; ``serving`` needs vLLM as
    well."""
    found = problems()
    if serving and not found and not has_cuda_vllm():
        found = ["vllm: expected its CUDA wheel, got none or a build for another device"]
    return f"{what}: cannot run here. {'; '.join(found)}.\n{NEEDS}" if found else None


def require(what: str, serving: bool = False) -> None:
    """End with status 2 and the refusal where there is one."""
    reason = refusal(what, serving)
    if reason is not None:
        sys.stderr.write(reason + "\n")
        sys.exit(2)


def has_cuda_vllm() -> bool:
    """Whether vLLM is installed and is a build for CUDA."""
    if importlib.util.find_spec("vllm") is None:
        return False
    from vllm.platforms import current_platform

    return bool(current_platform.is_cuda())
