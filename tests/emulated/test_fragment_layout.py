# SPDX-License-Identifier: Apache-2.0
"""The emulated MMA spreads its matrices over a warp as CuTe's traits of the same instruction say."""

import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1] / "csrc" / "cuda"))
import nvcc  # noqa: E402


def test_fragments_lie_as_cute_says(tmp_path: Path) -> None:
    compiler = nvcc.find_nvcc()
    if compiler is None:
        pytest.skip("the headers of the CUDA toolkit are not here")
    headers = nvcc.toolkit(compiler) / "include"
    program = tmp_path / "fragment_layout"
    includes = [*nvcc.cutlass_includes(), f"-I{headers}", f"-I{headers / 'cccl'}"]
    subprocess.run(["g++", "-std=c++17", "-w", *includes, "-o", program, HERE / "fragment_layout.cpp"], check=True)
    assert subprocess.run([program], capture_output=True, text=True, check=True).stdout == "int4 0 int8 0\n"
