# SPDX-License-Identifier: Apache-2.0
"""What is compiled once is compiled again where anything it was made of has changed."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from compiled import REPOSITORY, compiled

SOURCE = REPOSITORY / "csrc" / "emulator" / "library.cpp"


class Builder:
    """Counts what is built."""

    def __init__(self) -> None:
        self.built = 0

    def __call__(self, out: Path) -> None:
        self.built += 1
        out.write_text(f"{self.built}")


def test_the_same_sources_and_flags_are_built_once(tmp_path: Path) -> None:
    build = Builder()
    with ThreadPoolExecutor(4) as pool:
        found = set(pool.map(lambda _: compiled("a", [], ["-O1"], build, tmp_path), range(8)))
    assert build.built == 1
    assert [path.read_text() for path in found] == ["1"]


def test_another_flag_source_or_content_is_built_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build = Builder()
    inside = REPOSITORY / "tests" / "emulated" / "test_compiled.py"
    calls = [([], ["-O1"]), ([], ["-O2"]), ([inside], ["-O1"])]
    paths = [compiled("a", sources, flags, build, tmp_path) for sources, flags in calls]
    content = Path.read_bytes
    monkeypatch.setattr(
        Path, "read_bytes", lambda path: content(path) + b" " * (path == SOURCE), raising=True
    )
    paths.append(compiled("a", [], ["-O1"], build, tmp_path))
    assert build.built == len(set(paths)) == 4


def test_a_build_that_fails_leaves_nothing_to_be_found(tmp_path: Path) -> None:
    def fail(out: Path) -> None:
        out.write_text("half")
        raise OSError("no space left")

    with pytest.raises(OSError, match="no space left"):
        compiled("a", [], [], fail, tmp_path)
    build = Builder()
    assert compiled("a", [], [], build, tmp_path).read_text() == "1"
