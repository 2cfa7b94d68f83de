# SPDX-License-Identifier: Apache-2.0
"""Puts the CUDA library into the tree for ``make gpu-proof``: the bundle's if it belongs to this
tree, else one built here.

Then a new process loads it into this machine's torch and says what it holds. ``--rehearse`` puts
nothing anywhere: it loads the bundle's library, where there is one, and the tree's own.
"""

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.bundle import LIBRARY, ROOT, BundleError, build_ext, read_manifest
from smoothrot_vllm.errors import SmoothRotError

PLACE = ROOT / "smoothrot_vllm" / LIBRARY
LOAD = """
import json, sys, torch
torch.ops.load_library(sys.argv[1])
ops = torch.ops.smoothrot
names = ("cuda_architectures", "cuda_kernels")
found = {name: getattr(ops, name)() for name in names if hasattr(ops, name)}
print(json.dumps({"cpu_path": ops.kernel_name()} | found))
"""


def load(library: Path) -> dict[str, Any]:
    """What a library says of itself once a new process's torch has loaded it; that process must not
    have loaded another before.

    Raises:
        BundleError: it does not load.
    """
    done = subprocess.run(
        [sys.executable, "-c", LOAD, str(library)], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise BundleError(
            f"{library}: expected one that loads into torch {torch.__version__}, got:"
            f" {done.stderr.strip()[-800:]}"
        )
    said: dict[str, Any] = json.loads(done.stdout)
    return said | {
        "library": str(library),
        "torch": torch.__version__,
        "bytes": library.stat().st_size,
    }


def build(capability: str) -> float:
    """Compile for this GPU alone, into the tree; returns the seconds."""
    return build_ext(capability, "--inplace")


def put(bundle: Path, capability: str) -> dict[str, Any]:
    """The bundle's library or a new one, in its place; says which, and why."""
    try:
        manifest = read_manifest(bundle)
    except BundleError as error:
        print(f"{error}\nbuilding it here for {capability}", flush=True)
        return {"from": "built here", "because": str(error), "build_seconds": build(capability)}
    # Not over the file itself: a process that has the old one mapped would change under its feet.
    new = PLACE.with_suffix(".new")
    shutil.copyfile(bundle / LIBRARY, new)
    new.replace(PLACE)
    return {"from": "bundle", "manifest": manifest}


def rehearse(bundle: Path) -> dict[str, Any]:
    """Load what is there into this torch: the bundle's library, if it belongs to the tree, and
    the tree's own."""
    said = {"tree": load(PLACE)}
    if bundle.exists():
        read_manifest(bundle)
        said["bundle"] = load(bundle / LIBRARY)
        if not said["bundle"].get("cuda_kernels"):
            raise BundleError(
                f"{bundle / LIBRARY}: expected CUDA kernels in it, found none. Run `make"
                " gpu-bundle`."
            )
    return said


def main() -> int:
    """Put, load and write what was found as JSON; 1 with the reason where it cannot be."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--bundle", type=Path, required=True)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--rehearse", action="store_true")
    args = parser.parse_args()
    try:
        if args.rehearse:
            said = rehearse(args.bundle)
        else:
            if not torch.cuda.is_available():
                raise BundleError(
                    f"torch {torch.__version__}: expected an NVIDIA GPU and its driver, torch.cuda"
                    " finds none"
                )
            major, minor = torch.cuda.get_device_capability()
            said = put(args.bundle, f"{major}.{minor}")
            said |= load(PLACE)
            from smoothrot_vllm import ops

            ops.check_cuda(10 * major + minor)
    except (BundleError, SmoothRotError, OSError, subprocess.CalledProcessError) as error:
        print(f"library.py: {error}", file=sys.stderr)
        return 1
    args.json.write_text(json.dumps(said, indent=1) + "\n")
    print(json.dumps(said, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
