# SPDX-License-Identifier: Apache-2.0
"""The suite itself: names short enough to be read as claims, and two processes that leave nothing
out."""

import ast
from pathlib import Path

import pytest
import side_by_side

TESTS = Path(__file__).parent
LONGEST_NAME = 70


def test_names_are_short_enough_to_be_claims() -> None:
    names = {
        f"{path.relative_to(TESTS)}::{node.name}": len(node.name)
        for path in TESTS.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
    }
    assert len(names) > 400
    assert [name for name, length in names.items() if length > LONGEST_NAME] == []


def test_every_file_is_run_by_one_of_the_two_processes() -> None:
    vllm, (everything, *ignored) = side_by_side.halves().values()
    assert everything == str(TESTS)
    assert ignored == [f"--ignore={file}" for file in vllm]
    assert len(vllm) > 10
    assert all((TESTS / "e2e" / name).is_file() for name in side_by_side.BESIDE)


@pytest.mark.parametrize("fails", ["vllm", "rest"])
def test_a_failure_of_either_process_fails_the_run(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    fails: str,
) -> None:
    for name in ("vllm", "rest"):
        (tmp_path / f"test_{name}.py").write_text(f"def test_{name}(): assert {name != fails}\n")
    chosen = {name: [str(tmp_path / f"test_{name}.py")] for name in ("vllm", "rest")}
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    monkeypatch.setattr(side_by_side, "halves", lambda: chosen)
    assert side_by_side.main(["-q", "-p", "no:cacheprovider"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert all(line.startswith(("vllm | ", "rest | ")) for line in lines)
    (failed,) = (line for line in lines if " failed" in line)
    (passed,) = (line for line in lines if " passed" in line)
    assert failed.startswith(f"{fails} | 1 failed")
    assert not passed.startswith(fails)
