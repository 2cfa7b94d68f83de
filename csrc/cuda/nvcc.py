# SPDX-License-Identifier: Apache-2.0
"""How the CUDA sources are compiled: for setup.py, which links them, and for the checks, which read
the machine code.

Only machine code is built (``-real``), never PTX: the driver would compile the int4 kernels' PTX
for newer devices into an emulation that is many times slower than the int8 kernels those devices
get.
"""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from importlib.machinery import PathFinder
from pathlib import Path

FOLDER = Path(__file__).parent
DEFAULT_ARCHITECTURES = "8.0 9.0 10.0 12.0"
"""Capabilities built for without TORCH_CUDA_ARCH_LIST; sm_80 code runs on 8.6 and 8.9, sm_100 on
10.3, sm_120 on 12.1."""
CUTLASS = "nvidia-cutlass==4.2.0.0"
PACKAGED = (13, 0)
"""CUDA release of the packages below; its code runs under every driver for CUDA 13."""
PACKAGES = (
    "nvidia-cuda-nvcc==13.0.88",
    "nvidia-nvvm==13.0.88",
    "nvidia-cuda-crt==13.0.88",
    "nvidia-cuda-runtime==13.0.96",
    "nvidia-cuda-cccl==13.0.85",
)
"""A whole nvcc from PyPI. For CUDA 12 there is none: its packages hold ptxas alone."""
OLDEST_NVCC = (12, 0)
"""The first that knows wgmma. 13.0 and 13.5 were tried."""
COMPRESSING_NVCC = (12, 8)
"""The first that takes this flag:"""
COMPRESS = "--compress-mode=size"
SYSTEM_FOLDER = "/usr/local/cuda/bin"
PACKAGED_PARTS = (
    "bin/nvcc",
    "nvvm/bin/cicc",
    "include/crt/host_config.h",
    "include/cccl/cuda/std/version",
    "lib/libcudart_static.a",
)
"""One file of each of PACKAGES."""
OLDEST = (8, 0)
GIBIBYTES_A_JOB = 4.5
"""Memory that nvcc takes for one CUTLASS 3.x source."""
FLAGS = [
    "-std=c++17",
    "-O3",
    "-DNDEBUG",
    "-fmad=false",  # the reference rounds after each operation
    "--expt-relaxed-constexpr",
    COMPRESS,
    "-Xptxas=-v,-warn-spills",
    "-Xcompiler=-fPIC,-fvisibility=hidden",
]


class NvccError(RuntimeError):
    """The CUDA sources cannot be compiled as asked."""


@dataclass(frozen=True)
class Unit:
    """One source and the architectures it is compiled for, such as ``("80", "90a")``."""

    source: Path
    architectures: tuple[str, ...]

    def object(self, folder: Path) -> Path:
        """Where its object file goes."""
        return folder / f"{self.source.stem}.{'_'.join(self.architectures)}.o"


def find_nvcc(folders: Sequence[str] = sys.path) -> str | None:
    """``$CUDACXX``; else nvcc in ``$CUDA_HOME``, or if not set on PATH or in /usr/local/cuda;
    else PyPI's in ``folders``."""
    named, home = os.environ.get("CUDACXX"), os.environ.get("CUDA_HOME")
    toolkits = (
        f"{home}/bin"
        if home
        else os.pathsep.join((os.environ.get("PATH", os.defpath), SYSTEM_FOLDER))
    )
    return named or shutil.which("nvcc", path=toolkits) or _packaged_nvcc(folders)


def _packaged_nvcc(folders: Sequence[str]) -> str | None:
    """``nvcc`` of the package nvidia-cuda-nvcc, if the packages that it compiles and links with
    are beside it."""
    for folder in folders:
        root = Path(folder, "nvidia", "cu13")
        if all((root / part).exists() for part in PACKAGED_PARTS):
            return str(root / "bin" / "nvcc")
    return None


@cache
def version(nvcc: str) -> tuple[int, int]:
    """Its CUDA release, such as ``(13, 0)``.

    Raises:
        NvccError: it does not run, or is older than :data:`OLDEST_NVCC`.
    """
    try:
        said = subprocess.run(
            [nvcc, "--version"], capture_output=True, text=True, check=False
        ).stdout
    except OSError as error:
        raise NvccError(f"{nvcc}: expected a CUDA compiler, got: {error}") from None
    release = re.search(r"release (\d+)\.(\d+)", said)
    if release is None:
        raise NvccError(
            f"{nvcc}: expected a CUDA compiler, got: {said.strip()[:200] or 'no output'}"
        )
    found = int(release[1]), int(release[2])
    if found < OLDEST_NVCC:
        raise NvccError(
            f"{nvcc}: expected CUDA 12.0 or newer, got {found[0]}.{found[1]}. Name a newer nvcc"
            " with CUDACXX."
        )
    return found


@cache
def toolkit(nvcc: str) -> Path:
    """Root of the toolkit, which holds ``include`` and the libraries."""
    version(nvcc)
    plan = subprocess.run(
        [nvcc, "--dryrun", "-x", "cu", "-c", os.devnull],
        capture_output=True,
        text=True,
        check=False,
    ).stderr
    top = re.search(r"^#\$ TOP=(.+)$", plan, re.MULTILINE)
    if top is None:
        raise NvccError(
            f"{nvcc}: expected a CUDA compiler, got: {plan.strip()[:200] or 'no output'}"
        )
    return Path(top.group(1).strip()).resolve()


def static_runtime(nvcc: str) -> Path:
    """The toolkit's ``libcudart_static.a``: in ``lib64``, in ``lib`` where pip installed it.

    Raises:
        NvccError: it is not there.
    """
    for name in ("lib64", "lib"):
        library = toolkit(nvcc) / name / "libcudart_static.a"
        if library.exists():
            return library
    raise NvccError(
        f"{toolkit(nvcc)}: expected lib64/libcudart_static.a, found none. Install all of the CUDA"
        " toolkit."
    )


@cache
def known_architectures(nvcc: str) -> frozenset[int]:
    """Machine-code architectures that this nvcc can write, as 10 * major + minor."""
    listed = subprocess.run(
        [nvcc, "--list-gpu-code"], capture_output=True, text=True, check=True
    ).stdout
    return frozenset(map(int, re.findall(r"sm_(\d+)", listed)))


def architectures(nvcc: str, setting: str | None = None) -> tuple[str, ...]:
    """Architectures to build for, from a list as torch takes it: ``"8.0;9.0a 12.0+PTX"``.

    Capabilities below 8.0 have no int4 MMA of the needed shape and are left out, and so is PTX.

    Raises:
        NvccError: an entry is no capability, none is left, or nvcc cannot build one that was asked
            for.
    """
    names = []
    for entry in re.split(r"[\s;,]+", (setting or DEFAULT_ARCHITECTURES).strip()):
        parts = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", entry)
        if parts is None:
            raise NvccError(
                f"TORCH_CUDA_ARCH_LIST: expected capabilities such as {DEFAULT_ARCHITECTURES!r},"
                f" got {entry!r}"
            )
        capability = int(parts[1]), int(parts[2])
        if capability >= OLDEST:
            # wgmma exists only in the architecture-specific code of 9.0; nothing else is specific.
            names.append("90a" if capability == (9, 0) else f"{capability[0]}{capability[1]}")
    known = known_architectures(nvcc)
    if setting is None:
        names = [name for name in names if _number(name) in known]
    if not names or any(_number(name) not in known for name in names):
        raise NvccError(
            f"TORCH_CUDA_ARCH_LIST={setting!r}: expected capabilities from 8.0 on that {nvcc} can"
            f" build (sm_ {' '.join(map(str, sorted(known)))}), got {' '.join(names) or 'none'}"
        )
    return tuple(sorted(set(names), key=_number))


def _number(architecture: str) -> int:
    return int(architecture.rstrip("af"))


def units(archs: tuple[str, ...]) -> list[Unit]:
    """Every source with the architectures among ``archs`` that it is meant for; the slowest to
    compile come first."""
    native_int4 = tuple(a for a in archs if _number(a) < 90)
    families = {
        "cutlass_sm90": ("90a",) if "90a" in archs else (),
        "cutlass_sm80": native_int4,
        "": archs,
    }
    found = []
    for prefix, chosen in families.items():
        for source in sorted(FOLDER.glob("*.cu")):
            if chosen and next(p for p in families if source.name.startswith(p)) == prefix:
                found.append(Unit(source, chosen))
    return found


def definitions(archs: tuple[str, ...]) -> list[str]:
    """Macros that tell the host sources what was built."""
    macros = [f'-DSMOOTHROT_CUDA_ARCHITECTURES="{" ".join(archs)}"']
    if any(_number(a) < 90 for a in archs):
        macros.append("-DSMOOTHROT_SM80")
    if "90a" in archs:
        macros.append("-DSMOOTHROT_SM90")
    return macros


def find_cutlass(folders: Sequence[str] = sys.path) -> Path | None:
    """Sources of CUTLASS in the package nvidia-cutlass."""
    package = PathFinder.find_spec("cutlass_library", list(folders))
    return (
        Path(package.origin).parent / "source" if package is not None and package.origin else None
    )


def cutlass_includes() -> list[str]:
    """Header folders of CUTLASS.

    Raises:
        NvccError: it is not installed.
    """
    source = find_cutlass()
    if source is None:
        raise NvccError(
            f"CUTLASS headers: expected the package {CUTLASS}, found none. pip install --no-deps"
            f" {CUTLASS}"
        )
    return [f"-I{source / 'include'}", f"-I{source / 'tools/util/include'}"]


def command(nvcc: str, unit: Unit, folder: Path) -> list[str]:
    """The compiler call of one unit."""
    target = unit.object(folder)
    includes = cutlass_includes() if unit.source.name.startswith("cutlass") else []
    codes = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in unit.architectures]
    dependencies = ["-MD", "-MF", str(target.with_suffix(".d"))]
    flags = [flag for flag in FLAGS if flag != COMPRESS or version(nvcc) >= COMPRESSING_NVCC]
    return [
        nvcc,
        *flags,
        *includes,
        *codes,
        *dependencies,
        "-c",
        str(unit.source),
        "-o",
        str(target),
    ]


def _is_current(target: Path, call: list[str]) -> bool:
    record, dependencies = target.with_suffix(".cmd"), target.with_suffix(".d")
    if not (
        target.exists()
        and dependencies.exists()
        and record.exists()
        and record.read_text() == " ".join(call)
    ):
        return False
    made = target.stat().st_mtime
    files = re.findall(r"(?:\\ |[^\s\\])+", dependencies.read_text().partition(":")[2])
    return all(os.path.exists(file) and os.stat(file).st_mtime <= made for file in files)


def compile_unit(nvcc: str, unit: Unit, folder: Path) -> Path:
    """Compile unless the object is newer than all it was made from; what ptxas said is kept beside
    it in ``.log``.

    Raises:
        NvccError: with the compiler's output.
    """
    target, call = unit.object(folder), command(nvcc, unit, folder)
    folder.mkdir(parents=True, exist_ok=True)
    if _is_current(target, call):
        return target
    target.with_suffix(".cmd").unlink(missing_ok=True)
    print("nvcc", unit.source.name, " ".join(unit.architectures), flush=True)
    done = subprocess.run(call, capture_output=True, text=True, check=False)
    if done.returncode:
        raise NvccError(
            f"{unit.source.name} for {' '.join(unit.architectures)}:\n{done.stdout}{done.stderr}"
        )
    target.with_suffix(".log").write_text(done.stdout + done.stderr)
    target.with_suffix(".cmd").write_text(" ".join(call))
    return target


def jobs() -> int:
    """``$MAX_JOBS``, or as many as there are cores and memory for."""
    if os.environ.get("MAX_JOBS"):
        return int(os.environ["MAX_JOBS"])
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES") / 2**30
    return max(1, min(len(os.sched_getaffinity(0)), int(memory / GIBIBYTES_A_JOB)))


def compile_units(nvcc: str, chosen: list[Unit], folder: Path) -> list[Path]:
    """Objects of all units, compiled in parallel."""
    with ThreadPoolExecutor(jobs()) as pool:
        return list(pool.map(lambda unit: compile_unit(nvcc, unit, folder), chosen))
