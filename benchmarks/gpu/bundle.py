# SPDX-License-Identifier: Apache-2.0
"""``make gpu-bundle``: what ``make gpu-proof`` takes to a machine with a GPU and no network.

The folder holds ``_C.abi3.so`` built for :data:`ARCHITECTURES`, ``manifest.json`` that says what it
was built from and with, and ``wheels/`` of what such a machine lacks. It needs nvcc, no GPU, and
takes minutes where nothing was compiled before.
"""

import argparse
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
ARCHITECTURES = "8.0 9.0"
"""sm_80 code runs on 8.6 and 8.9 as well."""
PYTHON = "3.12"
PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64")
# Their versions are those of the lock, so that what is proven is what `make env` installs.
LOCKED = ("pydantic", "pydantic_core", "annotated-types", "typing-inspection", "nvidia-cutlass")
OWN = ("humming-kernels==0.1.19",)
"""Only a peer of the benchmarks."""
MOST_BYTES = 60 << 20
"""Of the bundle and the tree together: some machines take no more than 64 MiB."""
LIBRARY, MANIFEST, WHEELS = "_C.abi3.so", "manifest.json", "wheels"


class BundleError(RuntimeError):
    """The bundle cannot be made, or does not belong to this tree."""


def source_hash(root: Path = ROOT) -> str:
    """SHA-256 of everything that the library is compiled from."""
    digest = hashlib.sha256()
    files = [
        path
        for path in (root / "csrc").rglob("*")
        if path.suffix in (".h", ".cpp", ".cu", ".cuh", ".py")
    ]
    for path in sorted([*files, root / "setup.py"]):
        digest.update(f"{path.relative_to(root)}\n{path.stat().st_size}\n".encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()


def read_manifest(bundle: Path, root: Path = ROOT) -> dict[str, Any]:
    """The manifest of a bundle whose library was compiled from this tree's sources.

    Raises:
        BundleError: there is none, the library is not the one it describes, or it was compiled from
            other sources.
    """
    try:
        manifest: dict[str, Any] = json.loads((bundle / MANIFEST).read_text())
        library = hashlib.sha256((bundle / LIBRARY).read_bytes()).hexdigest()
    except (OSError, ValueError) as error:
        raise BundleError(
            f"{bundle}: expected {MANIFEST} and {LIBRARY}, got {error}. Run `make gpu-bundle`."
        ) from error
    if manifest.get("library_sha256") != library:
        raise BundleError(
            f"{bundle / LIBRARY}: expected SHA-256 {manifest.get('library_sha256')}, got {library}."
            " Run `make gpu-bundle`."
        )
    if manifest.get("source_sha256") != source_hash(root):
        raise BundleError(
            f"{bundle / LIBRARY}: expected one compiled from this tree's csrc"
            f" ({source_hash(root)}), got one from {manifest.get('source_sha256')}. Run `make"
            " gpu-bundle`."
        )
    return manifest


def build_ext(architectures: str, *words: str) -> float:
    """Compile the library for these GPUs; returns the seconds it took, few where the objects of
    an earlier build are current."""
    start = time.monotonic()
    settings = {"SMOOTHROT_CUDA": "1", "TORCH_CUDA_ARCH_LIST": architectures}
    command = [sys.executable, "setup.py", "build_ext", *words]
    subprocess.run(command, check=True, cwd=ROOT, env=os.environ | settings)
    return time.monotonic() - start


def build_library(out: Path) -> float:
    """Compile the library to ``out``; returns the seconds."""
    folder = ROOT / "build" / "gpu-bundle"
    places = ("--build-lib", str(folder), "--build-temp", str(folder / "objects"))
    seconds = build_ext(ARCHITECTURES, *places)
    shutil.copyfile(folder / "smoothrot_vllm" / LIBRARY, out)
    return seconds


def requirements() -> list[str]:
    """Names and versions of the wheels."""
    lock = (ROOT / "requirements" / "lock.txt").read_text()
    found = []
    for name in LOCKED:
        line = re.search(
            rf"^{re.escape(name).replace('_', '[-_]')}==\S+", lock, re.MULTILINE | re.IGNORECASE
        )
        if line is None:
            raise BundleError(f"requirements/lock.txt: expected a line for {name}, found none")
        found.append(line[0])
    return [*found, *OWN]


def download_wheels(folder: Path) -> None:
    """Fetch what a machine of :data:`PYTHON` lacks, without what those need: all of it is named
    here or there already."""
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps"]
    command += ["--only-binary=:all:", f"--python-version={PYTHON}", "--implementation=cp"]
    command += [f"--platform={name}" for name in PLATFORMS]
    subprocess.run([*command, "-d", str(folder), *requirements()], check=True)


def tree_bytes() -> int:
    """Size of the files that git would take along."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        check=True,
        cwd=ROOT,
        capture_output=True,
    )
    paths = [ROOT / os.fsdecode(name) for name in listed.stdout.split(b"\0") if name]
    return sum(path.stat().st_size for path in paths if path.is_file())


def main() -> int:
    """Make the folder anew; 1 with the reason where it cannot be."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=ROOT / "gpu-bundle")
    args = parser.parse_args()
    out: Path = args.out
    try:
        (out / WHEELS).mkdir(parents=True, exist_ok=True)
        (out / MANIFEST).unlink(missing_ok=True)
        for old in (out / WHEELS).iterdir():
            old.unlink()
        sources = source_hash()
        seconds = build_library(out / LIBRARY)
        download_wheels(out / WHEELS)
        if source_hash() != sources:
            raise BundleError(
                f"{ROOT / 'csrc'}: changed while it was compiled. Run `make gpu-bundle` again."
            )
        sizes = {
            str(path.relative_to(out)): path.stat().st_size
            for path in sorted(out.rglob("*"))
            if path.is_file()
        }
        together = sum(sizes.values()) + tree_bytes()
        if together >= MOST_BYTES:
            raise BundleError(
                f"{out} and the tree: expected less than {MOST_BYTES >> 20} MiB, got"
                f" {together / 2**20:.1f}"
            )
        manifest = {
            "source_sha256": sources,
            "library_sha256": hashlib.sha256((out / LIBRARY).read_bytes()).hexdigest(),
            "architectures": ARCHITECTURES,
            "torch_target": _constant("TORCH_TARGET_VERSION"),
            "nvcc": (
                subprocess.run(
                    ["nvcc", "--version"], check=True, capture_output=True, text=True
                ).stdout.split()[-1]
            ),
            "build_seconds": round(seconds, 1),
            "bytes": sizes,
        }
        (out / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")
    except (BundleError, OSError, subprocess.CalledProcessError) as error:
        print(f"make gpu-bundle: {error}", file=sys.stderr)
        return 1
    print(json.dumps(manifest, indent=1))
    print(f"{together / 2**20:.1f} MiB with the tree")
    return 0


def _constant(name: str) -> str:
    found = re.search(rf'^{name} = "(\w+)"', (ROOT / "setup.py").read_text(), re.MULTILINE)
    if found is None:
        raise BundleError(f"setup.py: expected {name}, found none")
    return found[1]


if __name__ == "__main__":
    sys.exit(main())
