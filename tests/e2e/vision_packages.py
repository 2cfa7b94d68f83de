# SPDX-License-Identifier: Apache-2.0
"""Packages that vLLM's and transformers' code for images imports, kept beside the environment.

PyPI's torchvision is built for CUDA. Beside a CPU torch its compiled part does not load, and then
its Python code ends on the names of two operators. Nothing here calls them, so they are declared.
"""

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.support.packaged_models import default_cache

PACKAGES = ("torchvision==0.28.0", "num2words==0.5.14")
_LOADING = 'if _load_library("_C"):\n'
_DECLARED = """
if not _has_ops():
    _names = torch.library.Library("torchvision", "DEF")
    _names.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _names.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
"""


def vision_packages() -> Path:
    """A folder for PYTHONPATH, made on the first call from the package index that pip is configured
    with.

    Raises:
        RuntimeError: pip could not install a package, or torchvision is not as expected.
    """
    python = f"cp{sys.version_info.major}{sys.version_info.minor}"
    target = default_cache() / f"vision-packages-{python}"
    if target.exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=target.name, dir=target.parent))
    try:
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target"]
        done = subprocess.run(
            [*command, str(work / "new"), *PACKAGES], capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise RuntimeError(f"pip install {' '.join(PACKAGES)}: {done.stderr}")
        extension = work / "new" / "torchvision" / "extension.py"
        source = extension.read_text(encoding="utf-8")
        if source.count(_LOADING) != 1:
            raise RuntimeError(f"{PACKAGES[0]}: expected {_LOADING!r} in {extension.name}")
        extension.write_text(source + _DECLARED, encoding="utf-8")
        # It appears whole or not at all; what another process made meanwhile is the same.
        if not target.exists():
            (work / "new").rename(target)
    finally:
        shutil.rmtree(work)
    return target
