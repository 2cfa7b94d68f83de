# SPDX-License-Identifier: Apache-2.0
"""What setup.py builds with: the torch and the nvcc of the environment that the package is
installed into.

pip builds in an environment of its own, which it empties of everything but the build's
requirements; the interpreter is still the user's, and says where their packages are. So the kernels
are built against the torch that is there, and no second one is downloaded. uv builds with an
interpreter of its own: there, and where no torch is, one is a requirement.
"""

import ast
import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.machinery import PathFinder
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "cuda"))
import nvcc

OLDEST_TORCH = (2, 11)
"""Its stable ABI has all that csrc/torch calls."""
TORCH = "torch==2.13.0"
"""Built against where none is installed; the library works with any from OLDEST_TORCH on."""
NVIDIA_DRIVER = (Path("/proc/driver/nvidia/version"), Path("/dev/nvidiactl"))
"""Files that a machine with an NVIDIA GPU has."""


class BuildError(RuntimeError):
    """The package cannot be built as asked."""


@dataclass(frozen=True)
class Torch:
    """An installed torch, of which nothing was imported."""

    folder: Path
    version: str
    cuda: str | None

    @property
    def include(self) -> Path:
        """Folder of its headers."""
        return self.folder / "include"

    @property
    def lib(self) -> Path:
        """Folder of its shared libraries."""
        return self.folder / "lib"


@dataclass(frozen=True)
class Plan:
    """What to build, and what pip must bring first.

    Attributes:
        torch: to build against; None if it is among the requirements.
        nvcc: compiler of the CUDA kernels; None if they are left out or it is among the
            requirements.
        without_cuda: why the CUDA kernels are left out, empty if they are not.
        requirements: packages that are missing from the environment, pinned.
    """

    torch: Torch | None
    nvcc: str | None
    without_cuda: str
    requirements: tuple[str, ...]


@cache
def search_path() -> tuple[str, ...]:
    """Folders of installed packages: of this build's environment, then of the one the
    interpreter belongs to."""
    hidden = ("PYTHONPATH", "PYTHONNOUSERSITE")  # how pip hides the environment
    environment = {name: value for name, value in os.environ.items() if name not in hidden}
    ask = [sys.executable, "-c", "import json, sys; print(json.dumps(sys.path[1:]))"]
    outer: list[str] = json.loads(
        subprocess.run(ask, env=environment, check=True, capture_output=True, text=True).stdout
    )
    return tuple(dict.fromkeys(folder for folder in (*sys.path, *outer) if folder))


def find_torch(folders: Sequence[str]) -> Torch | None:
    """The first torch in these folders if it is new enough, read from its ``version.py`` without
    importing it."""
    spec = PathFinder.find_spec("torch", list(folders))
    if spec is None or spec.origin is None:
        return None
    folder = Path(spec.origin).parent
    facts: dict[str, str | None] = {}
    for statement in ast.parse((folder / "version.py").read_text()).body:
        match statement:
            case (
                ast.Assign(targets=[ast.Name(id=name)], value=ast.Constant(value=value))
                | ast.AnnAssign(target=ast.Name(id=name), value=ast.Constant(value=value))
            ):
                facts[name] = value
    version = facts["__version__"] or ""
    release = re.match(r"(\d+)\.(\d+)", version)
    if release is None or (int(release[1]), int(release[2])) < OLDEST_TORCH:
        return None
    return Torch(folder, version, facts.get("cuda"))


def has_gpu() -> bool:
    """Whether an NVIDIA driver is loaded."""
    return any(path.exists() for path in NVIDIA_DRIVER)


def plan(environment: Mapping[str, str], folders: Sequence[str]) -> Plan:
    """Decide what is built from ``SMOOTHROT_CUDA`` and what is installed in ``folders``.

    Without ``SMOOTHROT_CUDA`` the CUDA kernels are built if torch is a CUDA build, or still to be
    installed, and the machine has nvcc or a GPU. An nvcc that is missing is a requirement: PyPI has
    one for CUDA 13.

    Raises:
        BuildError: ``SMOOTHROT_CUDA`` has another value, or the CUDA of torch and of nvcc do not go
        together. nvcc.NvccError: the nvcc that was found is too old or does not run.
    """
    setting = environment.get("SMOOTHROT_CUDA", "auto")
    if setting not in ("auto", "0", "1"):
        raise BuildError(f"SMOOTHROT_CUDA: expected 0, 1 or auto, got {setting!r}")
    torch = find_torch(folders)
    requirements = [] if torch else [TORCH]
    compiler = nvcc.find_nvcc(folders)
    without = ""
    if setting == "0":
        without = "SMOOTHROT_CUDA=0"
    elif setting == "auto" and torch is not None and torch.cuda is None:
        without = f"torch {torch.version} is a build without CUDA"
    elif setting == "auto" and compiler is None and not has_gpu():
        without = "there is neither nvcc nor a GPU here"
    if without:
        return Plan(torch, None, without, tuple(requirements))
    if torch is not None and torch.cuda is not None:
        _check_same_cuda(torch, compiler, insisted=setting == "1")
    if compiler is None:
        requirements += nvcc.PACKAGES
    if nvcc.find_cutlass(folders) is None:
        requirements.append(nvcc.CUTLASS)
    return Plan(torch, compiler, "", tuple(requirements))


def _check_same_cuda(torch: Torch, compiler: str | None, insisted: bool) -> None:
    """Refuse kernels that need a newer driver than this torch does."""
    version = nvcc.version(compiler) if compiler else nvcc.PACKAGED
    assert torch.cuda is not None
    if version[0] > int(torch.cuda.partition(".")[0]) and not (insisted and compiler):
        raise BuildError(
            f"nvcc: expected one of CUDA {torch.cuda}, as torch {torch.version} is built for, got"
            f" {version[0]}.{version[1]} ({compiler or 'from PyPI'}), whose kernels need a newer"
            " driver. Name the right nvcc with CUDACXX; SMOOTHROT_CUDA=1 builds with the newer one"
            " that is installed, SMOOTHROT_CUDA=0 leaves the CUDA kernels out."
        )
