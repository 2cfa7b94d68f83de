# SPDX-License-Identifier: Apache-2.0
"""The binding of the CUDA ops built for a make-believe GPU, and nvcc where it is installed."""

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import REPOSITORY
from torch.utils.cpp_extension import include_paths

sys.path.insert(0, str(REPOSITORY / "csrc" / "cuda"))
sys.path.insert(0, str(REPOSITORY / "csrc" / "emulator"))

FLAGS = ["-std=c++17", "-O1", "-g0", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-Wno-attributes"]
DEFINITIONS = [
    *("-DTORCH_TARGET_VERSION=0x020b000000000000", "-DSMOOTHROT_EMULATED", "-DSMOOTHROT_EMULATED_INT4=1"),
    *("-DSMOOTHROT_SM80", "-DSMOOTHROT_SM90"),
]
SOURCES = ["csrc/torch/cuda_ops.cpp", "csrc/cuda/dispatch.cpp", "csrc/emulator/library.cpp", "tests/cuda/cpu_device.cpp"]


@pytest.fixture(scope="session")
def emulated_library(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """``torch.ops.smoothrot_emulated``: the CUDA ops' own code, on CPU tensors."""
    folder = tmp_path_factory.mktemp("emulated_ops")
    includes = [f"-I{path}" for path in include_paths()]

    def compile_one(source: str) -> str:
        target = str(folder / f"{Path(source).stem}.o")
        command = ["g++", *FLAGS, *DEFINITIONS, *includes, "-c", str(REPOSITORY / source), "-o", target]
        subprocess.run(command, check=True)
        return target

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compile_one, SOURCES))
    library = folder / "emulated.so"
    libraries = [f"-L{Path(torch.__file__).parent / 'lib'}", "-ltorch_cpu", "-lc10", "-Wl,--no-undefined"]
    subprocess.run(["g++", "-shared", "-o", str(library), *objects, *libraries], check=True)
    torch.ops.load_library(str(library))
    return torch.ops.smoothrot_emulated


@pytest.fixture
def gpu(emulated_library: Any) -> Any:
    """The emulated ops on what they take for an A100."""
    torch.manual_seed(0)
    emulated_library.pretend(80, 108, 99 * 1024)
    return emulated_library
