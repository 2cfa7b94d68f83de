# SPDX-License-Identifier: Apache-2.0
"""Host programs against CUTLASS's headers."""

import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1] / "csrc" / "cuda"))
import nvcc  # noqa: E402


def build_cutlass_program(source: str, out: Path, *flags: str) -> Path:
    """Compile a source of this folder with g++; skips the test where the CUDA toolkit's headers
    are absent."""
    compiler = nvcc.find_nvcc()
    if compiler is None:
        pytest.skip("the headers of the CUDA toolkit are not here")
    headers = nvcc.toolkit(compiler) / "include"
    includes = [*nvcc.cutlass_includes(), f"-I{headers}", f"-I{headers / 'cccl'}"]
    subprocess.run(
        ["g++", "-std=c++17", "-w", *flags, *includes, "-o", out, HERE / source], check=True
    )
    return out
