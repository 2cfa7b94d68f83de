# SPDX-License-Identifier: Apache-2.0
"""The driver of ``make gpu-proof``: failures, limits, result files, and a bundle that belongs to
another tree."""

import hashlib
import json
import os
import sys
import tarfile
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from benchmarks.gpu import proof, sanitizer
from benchmarks.gpu.bundle import LIBRARY, MANIFEST, ROOT, BundleError, read_manifest, source_hash
from benchmarks.gpu.lane import UNSUPPORTED, Lane, Step

TREE_FILES = ("csrc/cuda/one.cu", "setup.py")


def python(code: str) -> tuple[str, ...]:
    return (sys.executable, "-c", code)


@pytest.fixture
def lane(tmp_path: Path) -> Lane:
    return Lane(tmp_path / "out", tmp_path / "work", 1, {"run": "of the test"})


def steps(lane: Lane) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((lane.out / "proof.json").read_text())["steps"]
    return found


def statuses(lane: Lane) -> dict[str, str]:
    return {step["name"]: step["status"] for step in steps(lane)}


def run(lane: Lane, *steps: Step) -> int:
    return lane.run(list(steps), os.environ)


def gone(pid: int) -> bool:
    stat = Path(f"/proc/{pid}/stat")
    return not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] == "Z"


def test_a_failing_step_stops_only_what_needs_it_and_fails_the_whole(lane: Lane) -> None:
    status = run(
        lane,
        Step("bad", python("print('the reason'); raise SystemExit(3)"), 20),
        Step("missing", ("no-such-program",), 20),
        Step("needs bad", python(""), 20, needs=("bad",)),
        Step("good", python(""), 20),
    )
    assert status == 1
    assert statuses(lane) == {
        "bad": "failed",
        "missing": "failed",
        "needs bad": "left out",
        "good": "passed",
    }
    bad, missing, needs, _ = steps(lane)
    assert bad["reason"] == "exit status 3: the reason"
    assert "no-such-program" in missing["reason"]
    assert needs["reason"] == "needs bad"


def test_only_proofs_and_failures_count(lane: Lane) -> None:
    absent = Step("absent", python(""), 9, modules=("no_such_module",))
    unsupported = Step(
        "unsupported", python(f"print('not on this GPU'); raise SystemExit({UNSUPPORTED})"), 9
    )
    slow_benchmark = Step("slow", python("import time; time.sleep(60)"), 0.5, proves=False)
    assert run(lane, Step("good", python(""), 9), absent, unsupported, slow_benchmark) == 0
    assert statuses(lane) == {
        "good": "passed",
        "absent": "unsupported",
        "unsupported": "unsupported",
        "slow": "killed",
    }
    assert not json.loads((lane.out / "proof.json").read_text())["proven"]
    assert steps(lane)[2]["reason"] == "not on this GPU"
    assert run(lane, Step("slow proof", python("import time; time.sleep(60)"), 0.5)) == 1


def test_a_step_over_its_limit_is_killed_with_its_children(lane: Lane, tmp_path: Path) -> None:
    child = tmp_path / "pid"
    code = f"""
import pathlib, subprocess, sys, time
process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(120)"])
pathlib.Path({str(child)!r}).write_text(str(process.pid))
print("started", flush=True)
time.sleep(120)
"""
    start = time.monotonic()
    assert run(lane, Step("hangs", python(code), 3), Step("after", python(""), 20)) == 1
    assert time.monotonic() - start < 20
    assert statuses(lane) == {"hangs": "killed", "after": "passed"}
    assert steps(lane)[0]["tail"] == "started\n"
    pid = int(child.read_text())
    deadline = time.monotonic() + 10
    while not gone(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert gone(pid)


def test_steps_without_time_are_left_out_by_name(tmp_path: Path) -> None:
    lane = Lane(tmp_path / "out", tmp_path / "work", 0, {})
    assert run(lane, Step("late", python(""), 20)) == 1
    assert statuses(lane) == {"late": "left out"}
    assert "| late | left out |" in (lane.out / "proof.md").read_text()


def pytest_of(test: Path, text: str) -> tuple[str, ...]:
    test.write_text(f"import pytest\n{text}\n")
    return (sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(test))


def test_result_files_are_whole_after_each_step(lane: Lane, tmp_path: Path) -> None:
    """A test's report and a benchmark's go into the result; the second step reads what the first
    one left."""
    right_wrong_not = """
def test_right(): pass
def test_wrong(): assert 0
def test_not(): pytest.skip('why')"""
    report = tmp_path / "report.json"
    look = f"""
import json, pathlib
out = pathlib.Path({str(lane.out)!r})
assert [step["name"] for step in json.loads((out / "proof.json").read_text())["steps"]] == ["tests"]
assert not [path for path in out.iterdir() if path.name.startswith(".")]
pathlib.Path({str(report)!r}).write_text('{{"speed": 1.5}}')
"""
    tests = Step("tests", pytest_of(tmp_path / "test_two.py", right_wrong_not), 60, junit=True)
    looks = Step("look", python(look), 20, writes=report)
    assert run(lane, tests, looks, Step("none", python(""), 9, writes=tmp_path / "no")) == 1
    assert statuses(lane) == {"tests": "failed", "look": "passed", "none": "failed"}
    found, looked, _ = steps(lane)
    assert [found["tests"][kind] for kind in ("passed", "failed", "skipped")] == [1, 1, 1]
    assert found["tests"]["failures"][0].endswith("::test_wrong")
    assert looked["report"] == {"speed": 1.5}
    with tarfile.open(lane.out / "logs.tar.gz") as archive:
        assert {"logs/tests.log", "logs/tests.xml", "logs/look.log"} <= set(archive.getnames())


def test_a_run_of_only_skipped_tests_is_no_pass(lane: Lane, tmp_path: Path) -> None:
    command = pytest_of(tmp_path / "test_skipped.py", "def test_not(): pytest.skip('why')")
    assert run(lane, Step("tests", command, 60, junit=True)) == 1


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    for name in TREE_FILES:
        path = tmp_path / "tree" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"// {name}\n")
    return tmp_path / "tree"


@pytest.fixture
def bundle(tmp_path: Path, tree: Path) -> Path:
    folder = tmp_path / "bundle"
    folder.mkdir()
    (folder / LIBRARY).write_bytes(b"library")
    digest = hashlib.sha256(b"library").hexdigest()
    (folder / MANIFEST).write_text(
        json.dumps({"source_sha256": source_hash(tree), "library_sha256": digest})
    )
    return folder


def test_a_bundle_of_this_tree_is_taken(bundle: Path, tree: Path) -> None:
    assert read_manifest(bundle, tree)["source_sha256"] == source_hash(tree)


@pytest.mark.parametrize("name", TREE_FILES)
def test_a_bundle_of_other_sources_is_refused(bundle: Path, tree: Path, name: str) -> None:
    (tree / name).write_text("// changed\n")
    with pytest.raises(
        BundleError, match=r"expected one compiled from this tree's csrc .*Run `make gpu-bundle`"
    ):
        read_manifest(bundle, tree)


def test_a_bundle_whose_library_was_changed_is_refused(bundle: Path, tree: Path) -> None:
    (bundle / LIBRARY).write_bytes(b"another")
    with pytest.raises(BundleError, match="expected SHA-256"):
        read_manifest(bundle, tree)
    (bundle / LIBRARY).unlink()
    with pytest.raises(BundleError, match=r"No such file .*Run `make gpu-bundle`"):
        read_manifest(bundle, tree)


def test_every_step_names_files_that_are_here(tmp_path: Path) -> None:
    """A rehearsal leaves out the arguments of the real run."""
    commands = [s.command for s in proof.proof_steps(tmp_path, tmp_path, tmp_path, tmp_path)]
    words = {word.partition("::")[0] for command in commands for word in command}
    tests = {word for word in words if word.startswith("tests/")}
    assert all((ROOT / test).exists() for test in tests)
    assert {test.partition("::")[0] for test in sanitizer.TESTS} <= tests
    modules = {word for word in words if word.startswith("benchmarks.")}
    assert len(modules) == 5
    assert all(find_spec(name) for name in modules)


def test_the_steps_come_in_order_of_worth_within_limits(tmp_path: Path) -> None:
    """The rehearsal takes the same ones, but what only a GPU or vLLM can do."""
    real, rehearsal = (
        make(tmp_path / "none", tmp_path, tmp_path, tmp_path)
        for make in (proof.proof_steps, proof.rehearsal_steps)
    )
    names = [step.name for step in real]
    assert names == [
        *("facts", "library", "kernels", "ops", "runtime", "kernel-benchmark", "decode-benchmark"),
        *("memcheck", "racecheck", "synccheck", "converter", "cpu", "cpu-benchmark", "serving"),
    ]
    assert names[:-1] == [step.name for step in rehearsal]
    assert all(0 < step.seconds <= 400 for step in real)
    unproven = {"facts", "kernel-benchmark", "decode-benchmark", "cpu-benchmark", "serving"}
    assert {step.name for step in real if not step.proves} == unproven


def test_the_sanitizer_looks_at_every_kernel_of_the_sources() -> None:
    sources = (path for path in (ROOT / "csrc" / "cuda").iterdir() if path.is_file())
    uses = sum(path.read_text().count("\nSMOOTHROT_KERNEL(") for path in sources)
    assert len(sanitizer.kernel_names()) == uses > 5
