# SPDX-License-Identifier: Apache-2.0
"""The driver of ``make gpu-proof``: failures, limits, result files, and a bundle that belongs to
another tree."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import gpu_bundle
import gpu_proof
import gpu_sanitizer
import pytest
from gpu_bundle import LIBRARY, MANIFEST, BundleError, read_manifest, source_hash
from lane import UNSUPPORTED, Lane, Step

TREE_FILES = ("csrc/cuda/one.cu", "setup.py")


def python(code: str) -> tuple[str, ...]:
    return (sys.executable, "-c", code)


@pytest.fixture
def lane(tmp_path: Path) -> Lane:
    return Lane(tmp_path / "out", tmp_path / "work", 1, {"run": "of the test"})


def statuses(lane: Lane) -> dict[str, str]:
    record = json.loads((lane.out / "proof.json").read_text())
    return {step["name"]: step["status"] for step in record["steps"]}


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
    steps = json.loads((lane.out / "proof.json").read_text())["steps"]
    assert steps[0]["reason"] == "exit status 3: the reason"
    assert "no-such-program" in steps[1]["reason"]
    assert steps[2]["reason"] == "needs bad"


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
    record = json.loads((lane.out / "proof.json").read_text())
    assert not record["proven"]
    assert record["steps"][2]["reason"] == "not on this GPU"
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
    assert json.loads((lane.out / "proof.json").read_text())["steps"][0]["tail"] == "started\n"
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


def test_result_files_are_whole_after_each_step(lane: Lane, tmp_path: Path) -> None:
    """The second step reads what the first one left; a test's report and a benchmark's go into
    the result."""
    test, report = tmp_path / "test_two.py", tmp_path / "report.json"
    test.write_text(
        "import pytest\ndef test_right(): pass\ndef test_wrong(): assert 0\ndef test_not():"
        " pytest.skip('why')\n"
    )
    look = f"""
import json, pathlib, sys, tarfile
out = pathlib.Path({str(lane.out)!r})
steps = json.loads((out / "proof.json").read_text())["steps"]
assert [step["name"] for step in steps] == ["tests"] and "tests" in (out / "proof.md").read_text()
assert "logs/tests.log" in tarfile.open(out / "logs.tar.gz").getnames()
assert not [path for path in out.iterdir() if path.name.startswith(".")]
pathlib.Path({str(report)!r}).write_text('{{"speed": 1.5}}')
"""
    tests = Step(
        "tests",
        (sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(test)),
        60,
        junit=True,
    )
    assert (
        run(
            lane,
            tests,
            Step("look", python(look), 20, writes=report),
            Step("none", python(""), 9, writes=tmp_path / "no"),
        )
        == 1
    )
    assert statuses(lane) == {"tests": "failed", "look": "passed", "none": "failed"}
    steps = json.loads((lane.out / "proof.json").read_text())["steps"]
    counts = {kind: steps[0]["tests"][kind] for kind in ("passed", "failed", "skipped")}
    assert counts == {"passed": 1, "failed": 1, "skipped": 1}
    assert steps[0]["tests"]["failures"][0].endswith("::test_wrong")
    assert steps[0]["tests"]["skip_reasons"] == ["why"]
    assert steps[1]["report"] == {"speed": 1.5}
    with tarfile.open(lane.out / "logs.tar.gz") as archive:
        assert {"logs/tests.log", "logs/tests.xml", "logs/look.log"} <= set(archive.getnames())


def test_a_run_of_only_skipped_tests_is_no_pass(lane: Lane, tmp_path: Path) -> None:
    test = tmp_path / "test_skipped.py"
    test.write_text("import pytest\ndef test_not(): pytest.skip('why')\n")
    command = (sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(test))
    assert run(lane, Step("tests", command, 60, junit=True)) == 1


def test_who_stops_the_driver_stops_its_step(tmp_path: Path) -> None:
    child = tmp_path / "pid"
    sleeper = (
        f"import os, pathlib, time; pathlib.Path({str(child)!r}).write_text(str(os.getpid()));"
        " time.sleep(120)"
    )
    code = f"""
import sys, gpu_proof
from lane import Step
gpu_proof.rehearsal_steps = lambda *_: [Step("hangs", (sys.executable, "-c", {sleeper!r}), 100)]
sys.argv = ["gpu_proof.py", "--dry-run", "--out", {str(tmp_path / "out")!r}]
sys.exit(gpu_proof.main())
"""
    folder = str(Path(gpu_proof.__file__).parent)
    with subprocess.Popen(python(code), env=os.environ | {"PYTHONPATH": folder}) as driver:
        deadline = time.monotonic() + 30
        while not (child.exists() and child.read_text()) and time.monotonic() < deadline:
            time.sleep(0.05)
        driver.send_signal(signal.SIGTERM)
        assert driver.wait(20) == 128 + signal.SIGTERM
    assert gone(int(child.read_text()))


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
    steps = gpu_proof.proof_steps(tmp_path, tmp_path, tmp_path, tmp_path)
    named = [
        word.partition("::")[0]
        for step in steps
        for word in step.command
        if word.startswith("tests/") or word.endswith(".py")
    ]
    assert len(named) >= len(steps) - 1
    assert [name for name in named if not (gpu_bundle.ROOT / name).exists()] == []
    assert {name.partition("::")[0] for name in gpu_sanitizer.TESTS} <= set(named)


def test_the_sanitizer_looks_at_every_kernel_of_the_sources() -> None:
    sources = (gpu_bundle.ROOT / "csrc" / "cuda").glob("*_kernel*.h")
    uses = sum(path.read_text().count("\nSMOOTHROT_KERNEL(") for path in sources)
    assert len(gpu_sanitizer.kernel_names()) == uses > 5
