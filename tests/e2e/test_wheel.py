# SPDX-License-Identifier: Apache-2.0
"""The wheel as a user gets it: its tag, what it needs of a system, and a model served from it."""

import os
import re
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from tiny_models import BIN, REPOSITORY

from benchmarks.support.server import VllmServer, processes
from smoothrot_vllm.ops import LIBRARY

pytestmark = [pytest.mark.serve, pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What ``make wheel`` makes, without the CUDA kernels, which take minutes."""
    folder = tmp_path_factory.mktemp("wheel")
    make = [sys.executable, REPOSITORY / "requirements" / "make_wheel.py", folder]
    result = subprocess.run(
        make, env=os.environ | {"SMOOTHROT_CUDA": "0"}, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``bin`` of a fresh environment with the wheel in it and, behind it, the packages of this
    one."""
    folder = tmp_path_factory.mktemp("environment")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    pip: list[str | Path] = [
        sys.executable,
        "-m",
        "pip",
        "--python",
        folder / "bin" / "python",
        "install",
        "-q",
        "--no-deps",
        "--no-index",
        wheel,
    ]
    subprocess.run(pip, check=True)
    (packages,) = folder.glob("lib/python*/site-packages")
    behind = next(entry for entry in sys.path if Path(entry, "vllm").is_dir())
    (packages / "behind.pth").write_text(
        f"{behind}\n"
    )  # its own .pth files, such as that of an editable install, are not read
    script = (BIN / "vllm").read_text().partition("\n")[2]
    (folder / "bin" / "vllm").write_text(f"#!{folder / 'bin' / 'python'}\n{script}")
    (folder / "bin" / "vllm").chmod(0o755)
    return folder / "bin"


def test_one_wheel_serves_every_python_and_glibc_from_2_28_on(wheel: Path) -> None:
    assert re.fullmatch(
        r"smoothrot_vllm-[\d.]+\+cpu-py3-none-manylinux_2_28_x86_64\.whl", wheel.name
    )
    shown = subprocess.run(
        [BIN / "auditwheel", "show", wheel], capture_output=True, text=True, check=True
    ).stdout
    tag = re.search(r"constrains\s+the\s+platform\s+tag\s+to\s+\"manylinux_2_(\d+)_x86_64\"", shown)
    assert tag is not None, shown
    assert int(tag[1]) <= 28
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        (metadata,) = (name for name in names if name.endswith(".dist-info/METADATA"))
        assert "Requires-Dist: torch<2.16,>=2.11" in archive.read(metadata).decode()
    assert "smoothrot_vllm/_C.abi3.so" in names
    packages = (REPOSITORY / "smoothrot_vllm", REPOSITORY / "offline" / "smoothrot_offline")
    modules = {
        str(path.relative_to(package.parent))
        for package in packages
        for path in package.rglob("*.py")
    }
    assert {name for name in names if name.endswith(".py")} == modules
    assert not any(Path(name).name.startswith(("libtorch", "libc10")) for name in names)


def test_a_model_is_served_from_the_wheel(
    installed: Path, tiny_converted: Callable[..., Path], tmp_path: Path
) -> None:
    code = (
        "import smoothrot_vllm.ops as ops, smoothrot_offline.cli as cli; print(ops.LIBRARY,"
        " cli.__file__, ops.kernel_name())"
    )
    said = subprocess.run(
        [installed / "python", "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True
    ).stdout
    library, cli, kernel = said.split()
    root = installed.parent
    assert Path(library).is_relative_to(root)
    assert Path(cli).is_relative_to(root)
    assert kernel in ("avx512_vnni", "avx2", "portable")
    model = tiny_converted("llama", "--activation-bits", "8", "--scales", "none")
    options = ["--enforce-eager", "--max-model-len", "128", "--served-model-name", "m"]
    with VllmServer(model, tmp_path / "log", *options, executable=installed / "vllm") as server:
        answer = server.client.completions.create(
            model="m", prompt="Hello", max_tokens=4, extra_body={"ignore_eos": True}
        )
        maps = "".join(Path(f"/proc/{member}/maps").read_text() for member in processes(server.pid))
        assert answer.usage is not None
        assert answer.usage.completion_tokens == 4
    assert set(re.findall(r"\S+/_C\.abi3\.so", maps)) & {library, str(LIBRARY)} == {library}
