# SPDX-License-Identifier: Apache-2.0
"""A make-believe GPU: the CUDA ops' own code built with g++ for CPU tensors, its kernels
emulated."""

import re
import subprocess
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from compiled import compiled
from ops_contract import Target
from torch.utils.cpp_extension import include_paths

from smoothrot_vllm.hadamard import base_matrix, factorize

REPOSITORY = Path(__file__).parents[1]
FLAGS = [
    "-std=c++17",
    "-O1",
    "-g0",
    "-fPIC",
    "-fvisibility=hidden",
    "-ffp-contract=off",
    "-Wno-attributes",
]
DEFINITIONS = [
    "-DSMOOTHROT_EMULATED",
    "-DSMOOTHROT_EMULATED_INT4=1",
    "-DSMOOTHROT_SM80",
    "-DSMOOTHROT_SM90",
]
SOURCES = [
    "csrc/torch/cuda_ops.cpp",
    "csrc/torch/cuda_prepack.cpp",
    "csrc/cuda/dispatch.cpp",
    "csrc/emulator/library.cpp",
    "tests/cuda/cpu_device.cpp",
]
SHARED_BYTES = 99 * 1024


def torch_target_version() -> str:
    """Oldest torch whose stable ABI setup.py builds for, as the macro has it."""
    found = re.search(
        r'^TORCH_TARGET_VERSION = "(0x\w+)"', (REPOSITORY / "setup.py").read_text(), re.MULTILINE
    )
    assert found is not None
    return found[1]


def compile_flags() -> list[str]:
    """What every source is compiled with."""
    target = f"-DTORCH_TARGET_VERSION={torch_target_version()}"
    return [*FLAGS, *DEFINITIONS, target, *(f"-I{path}" for path in include_paths())]


def link_flags() -> list[str]:
    """What the objects are linked with."""
    libraries = Path(torch.__file__).parent / "lib"
    return ["-shared", f"-L{libraries}", "-ltorch_cpu", "-lc10", "-Wl,--no-undefined"]


def build_library(out: Path) -> None:
    """Compile all sources, two at a time, and link them."""
    with TemporaryDirectory() as folder:

        def compile_one(source: str) -> str:
            target = f"{folder}/{Path(source).stem}.o"
            command = ["g++", *compile_flags(), "-c", str(REPOSITORY / source), "-o", target]
            subprocess.run(command, check=True)
            return target

        with ThreadPoolExecutor(2) as pool:
            objects = list(pool.map(compile_one, SOURCES))
        subprocess.run(["g++", "-o", str(out), *objects, *link_flags()], check=True)


@cache
def emulated_library() -> Any:
    """``torch.ops.smoothrot_emulated``."""
    flags = [torch.__version__, *compile_flags(), *link_flags()]
    library = compiled(
        "emulated.so", [REPOSITORY / source for source in SOURCES], flags, build_library
    )
    torch.ops.load_library(library)
    return torch.ops.smoothrot_emulated


def emulated_target(capability: int, multiprocessors: int = 1) -> Target:
    """The emulated ops on what they take for a GPU of this capability."""
    ops = emulated_library()
    ops.pretend(capability, multiprocessors, SHARED_BYTES)

    def prepare(block: int) -> int:
        factors = factorize(block)
        assert factors is not None
        ops.prepare_cuda_rotation(base_matrix(factors.base), factors.power, -1)
        return block

    return Target(ops, torch.device("cpu"), torch.device("meta"), prepare)
