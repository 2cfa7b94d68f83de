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


@cache
def emulated_library() -> Any:
    """``torch.ops.smoothrot_emulated``, built once a process."""
    includes = [f"-I{path}" for path in include_paths()]
    definitions = [*DEFINITIONS, f"-DTORCH_TARGET_VERSION={torch_target_version()}"]
    with TemporaryDirectory() as folder:

        def compile_one(source: str) -> str:
            target = f"{folder}/{Path(source).stem}.o"
            subprocess.run(
                [
                    "g++",
                    *FLAGS,
                    *definitions,
                    *includes,
                    "-c",
                    str(REPOSITORY / source),
                    "-o",
                    target,
                ],
                check=True,
            )
            return target

        with ThreadPoolExecutor(2) as pool:
            objects = list(pool.map(compile_one, SOURCES))
        library = f"{folder}/emulated.so"
        libraries = [
            f"-L{Path(torch.__file__).parent / 'lib'}",
            "-ltorch_cpu",
            "-lc10",
            "-Wl,--no-undefined",
        ]
        subprocess.run(["g++", "-shared", "-o", library, *objects, *libraries], check=True)
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
