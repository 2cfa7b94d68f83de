# SPDX-License-Identifier: Apache-2.0
"""Host programs against CUTLASS's headers."""

import subprocess
import sys
from pathlib import Path

import pytest
from compiled import compiled

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1] / "csrc" / "cuda"))
import nvcc  # noqa: E402


def cutlass_program(source: str, *flags: str) -> Path:
    """A source of this folder compiled with g++; skips the test where the CUDA toolkit's headers
    are absent."""
    compiler = nvcc.find_nvcc()
    if compiler is None:
        pytest.skip("the headers of the CUDA toolkit are not here")
    headers = nvcc.toolkit(compiler) / "include"
    includes = [*nvcc.cutlass_includes(), f"-I{headers}", f"-I{headers / 'cccl'}"]
    call = ["-std=c++17", "-w", *flags, *includes]

    def build(out: Path) -> None:
        subprocess.run(["g++", *call, "-o", out, HERE / source], check=True)

    said = [nvcc.CUTLASS, *map(str, nvcc.version(compiler)), *call]
    return compiled(Path(source).stem, [HERE / source], said, build)
