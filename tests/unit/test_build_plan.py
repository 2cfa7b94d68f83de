# SPDX-License-Identifier: Apache-2.0
"""What setup.py finds in the environment that the package is installed into, and what it makes
of that."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from tiny_models import REPOSITORY

sys.path.insert(0, str(REPOSITORY / "csrc"))
import build_plan
import nvcc

Environment = Callable[..., list[str]]


def says_release(release: str) -> str:
    return f"#!/bin/sh\necho 'Cuda compilation tools, release {release}, V{release}.0'\n"


@pytest.fixture
def environment(tmp_path: Path) -> Environment:
    """A folder of make-believe packages that must not be imported."""

    def make(
        torch: str | None = None,
        cuda: str | None = None,
        cutlass: bool = False,
        nvcc_parts: tuple[str, ...] = (),
    ) -> list[str]:
        def write(file: str, text: str = "raise AssertionError('imported')\n") -> None:
            path = tmp_path / file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)

        if torch:
            write("torch/__init__.py")
            lines = [
                "from typing import Optional",
                f"__version__ = {torch!r}",
                f"cuda: Optional[str] = {cuda!r}",
                "hip = None",
            ]
            write("torch/version.py", "\n".join(lines))
        if cutlass:
            write("cutlass_library/__init__.py")
        for part in nvcc_parts:
            write(f"nvidia/cu13/{part}", says_release("13.0"))
            (tmp_path / "nvidia/cu13" / part).chmod(0o755)
        return [str(tmp_path / "nothing here"), str(tmp_path)]

    return make


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., None]:
    """Make the plan believe in an nvcc of some release on PATH, and in a GPU."""

    def pretend(release: str | None, gpu: bool) -> None:
        folder = tmp_path / "bin"
        folder.mkdir()
        if release:
            (folder / "nvcc").write_text(says_release(release))
            (folder / "nvcc").chmod(0o755)
        monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
        for name in ("CUDACXX", "CUDA_HOME"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setattr(nvcc, "SYSTEM_FOLDER", str(tmp_path / "no toolkit"))
        driver = tmp_path / "driver"
        if gpu:
            driver.touch()
        monkeypatch.setattr(build_plan, "NVIDIA_DRIVER", (driver,))

    return pretend


def test_torch_is_read_without_importing_it(environment: Environment) -> None:
    folders = environment("2.14.0+cu130", "13.0")
    torch = build_plan.find_torch(folders)
    assert torch == build_plan.Torch(Path(folders[1], "torch"), "2.14.0+cu130", "13.0")
    assert torch.include == Path(folders[1], "torch/include")


def test_the_installed_torch_is_found() -> None:
    import torch

    found = build_plan.find_torch(sys.path)
    assert found == build_plan.Torch(
        Path(torch.__file__).parent, str(torch.__version__), torch.version.cuda
    )
    assert (found.include / "torch/csrc/stable/library.h").exists()
    assert (found.lib / "libtorch_cpu.so").exists()


@pytest.mark.parametrize("version", [None, "2.10.1", "1.13.0"])
def test_a_torch_that_is_missing_or_too_old_is_a_requirement(
    environment: Environment, machine: Callable[..., None], version: str | None
) -> None:
    machine(None, gpu=False)
    plan = build_plan.plan({}, environment(version))
    assert (plan.torch, plan.requirements) == (None, (build_plan.TORCH,))


WHOLE_NVCC = nvcc.PACKAGED_PARTS


@pytest.mark.parametrize(
    ("setting", "cuda", "release", "gpu", "requirements", "without"),
    [
        ("auto", "13.0", "13.0", False, (nvcc.CUTLASS,), ""),
        (
            "auto",
            "13.0",
            None,
            True,
            (*nvcc.PACKAGES, nvcc.CUTLASS),
            "",
        ),  # a GPU: nvcc comes from PyPI
        ("auto", "13.0", None, False, (), "neither nvcc nor a GPU"),
        ("auto", None, "13.0", True, (), "torch 2.13.0 is a build without CUDA"),
        ("auto", "12.9", "12.4", True, (nvcc.CUTLASS,), ""),
        ("0", "13.0", "13.0", True, (), "SMOOTHROT_CUDA=0"),
        ("1", None, None, False, (*nvcc.PACKAGES, nvcc.CUTLASS), ""),
        ("1", "12.9", "13.0", True, (nvcc.CUTLASS,), ""),
    ],
)
def test_cuda_kernels_are_built_where_they_can_run(
    environment: Environment,
    machine: Callable[..., None],
    setting: str,
    cuda: str | None,
    release: str | None,
    gpu: bool,
    requirements: tuple[str, ...],
    without: str,
) -> None:
    machine(release, gpu)
    plan = build_plan.plan({"SMOOTHROT_CUDA": setting}, environment("2.13.0", cuda))
    assert plan.requirements == requirements
    assert without in plan.without_cuda
    assert bool(plan.without_cuda) == bool(without)
    assert (plan.nvcc is not None) == (release is not None and not without)


def test_a_complete_environment_lacks_nothing(
    environment: Environment, machine: Callable[..., None]
) -> None:
    machine(None, gpu=True)
    folders = environment("2.13.0", "13.0", cutlass=True, nvcc_parts=WHOLE_NVCC)
    plan = build_plan.plan({}, folders)
    assert (plan.nvcc, plan.requirements) == (str(Path(folders[1], "nvidia/cu13/bin/nvcc")), ())


@pytest.mark.parametrize("missing", WHOLE_NVCC)
def test_an_nvcc_from_pypi_without_its_other_packages_is_none(
    environment: Environment, missing: str
) -> None:
    assert (
        nvcc._packaged_nvcc(
            environment(nvcc_parts=tuple(part for part in WHOLE_NVCC if part != missing))
        )
        is None
    )


@pytest.mark.parametrize(
    ("setting", "release", "message"),
    [
        ("yes", "13.0", "SMOOTHROT_CUDA: expected 0, 1 or auto, got 'yes'"),
        ("auto", "13.0", r"expected one of CUDA 12\.9, as torch 2\.13\.0 is built for, got 13\.0"),
        ("auto", None, r"expected one of CUDA 12\.9.*got 13\.0 \(from PyPI\)"),
        ("1", None, r"expected one of CUDA 12\.9.*got 13\.0 \(from PyPI\)"),
    ],
)
def test_what_does_not_go_together_is_refused(
    environment: Environment,
    machine: Callable[..., None],
    setting: str,
    release: str | None,
    message: str,
) -> None:
    machine(release, gpu=True)
    with pytest.raises(build_plan.BuildError, match=message):
        build_plan.plan({"SMOOTHROT_CUDA": setting}, environment("2.13.0", "12.9"))


def test_an_nvcc_is_looked_for_in_the_named_toolkit_alone(
    machine: Callable[..., None], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    machine("13.0", gpu=False)
    on_path = str(tmp_path / "bin" / "nvcc")
    assert nvcc.find_nvcc([]) == on_path
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "absent"))
    assert nvcc.find_nvcc([]) is None
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert nvcc.find_nvcc([]) == on_path
    monkeypatch.setenv("CUDACXX", "/named/nvcc")
    assert nvcc.find_nvcc([]) == "/named/nvcc"
    monkeypatch.delenv("CUDACXX")
    monkeypatch.delenv("CUDA_HOME")
    monkeypatch.setenv("PATH", "/usr/bin")
    monkeypatch.setattr(nvcc, "SYSTEM_FOLDER", str(tmp_path / "bin"))
    assert nvcc.find_nvcc([]) == on_path


@pytest.mark.parametrize("has_torch", [True, False])
def test_the_build_hook_asks_for_what_the_environment_lacks(
    has_torch: bool, tmp_path: Path
) -> None:
    """As pip calls it: with setuptools in a folder of its own and the environment's packages
    hidden from sys.path."""
    import setuptools

    overlay = tmp_path / "overlay"
    overlay.mkdir()
    for package in (
        "setuptools",
        "_distutils_hack",
        f"setuptools-{setuptools.__version__}.dist-info",
    ):
        (overlay / package).symlink_to(Path(setuptools.__file__).parents[1] / package)
    hide = (
        "import sys; sys.path = [p for p in sys.path if not p.endswith(('site-packages',"
        " 'dist-packages'))]"
    )
    (overlay / "sitecustomize.py").write_text(hide)
    python = sys.executable
    if not has_torch:
        subprocess.run(
            [sys.executable, "-m", "venv", "--without-pip", tmp_path / "bare"], check=True
        )
        python = str(tmp_path / "bare" / "bin" / "python")
    code = (
        "import importlib.util, json, setuptools.build_meta as build; assert"
        " importlib.util.find_spec('torch') is None;asked = build.get_requires_for_build_wheel();"
        " print(json.dumps(asked))"
    )
    variables = os.environ | {
        "PYTHONPATH": str(overlay),
        "PYTHONNOUSERSITE": "1",
        "SMOOTHROT_CUDA": "0",
    }
    call = [python, "-c", code]
    done = subprocess.run(
        call, cwd=REPOSITORY, env=variables, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == ([] if has_torch else [build_plan.TORCH])
