# SPDX-License-Identifier: Apache-2.0
"""Runs commands one after the other within a time, each in a process group with its own limit, and
keeps what they gave.

A step that fails, hangs or is missing does not stop the others. After each step the result files
are written anew and whole: ``proof.json``, ``proof.md`` and ``logs.tar.gz``.
"""

import contextlib
import importlib.util
import io
import json
import os
import re
import shlex
import signal
import subprocess
import tarfile
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

UNSUPPORTED = 77
"""Exit status of a command that cannot do its work on this machine and says why in its last
line, as automake has it."""
TAIL_CHARACTERS = 3000
MOST_NAMES = 40
SETTLE_SECONDS = 2.0
LEAST_SECONDS = 5.0
"""A step that would have less than this is not begun."""


@dataclass(frozen=True)
class Step:
    """One command."""

    name: str
    command: tuple[str, ...]
    seconds: float
    """After which its process group is killed."""
    needs: tuple[str, ...] = ()
    """Steps that must have passed."""
    proves: bool = True
    """Whether it must have passed for the whole to count as proven; a benchmark need not have
    had the time."""
    junit: bool = False
    """Whether the command is pytest's, and writes its report where ``--junit-xml`` says."""
    writes: Path | None = None
    """A file of JSON that it leaves, which goes into the result as a whole."""
    modules: tuple[str, ...] = ()
    """Packages without which it is not for this machine."""


@dataclass
class Result:
    """What came of a step. ``status``: passed, failed, killed, unsupported, left out."""

    name: str
    command: str
    status: str
    proves: bool
    seconds: float = 0.0
    limit: float = 0.0
    reason: str = ""
    tests: dict[str, Any] = field(default_factory=dict)
    report: Any = None
    tail: str = ""


class Lane:
    """Steps in order of worth, their results and the files that hold them."""

    def __init__(self, out: Path, work: Path, minutes: float, facts: Mapping[str, Any]) -> None:
        self.out, self.facts = out, dict(facts)
        self.logs = work / "logs"
        self.end = time.monotonic() + 60 * minutes
        self.results: list[Result] = []
        for folder in (self.out, self.logs):
            folder.mkdir(parents=True, exist_ok=True)

    def run(self, steps: list[Step], environment: Mapping[str, str]) -> int:
        """Run all of them; 1 if one failed, or if one that proves something was killed or left
        out, else 0."""
        for step in steps:
            self.results.append(self._run(step, environment))
            self.write()
            print(_line(self.results[-1]), flush=True)
        return int(any(_breaks(result) for result in self.results))

    def _run(self, step: Step, environment: Mapping[str, str]) -> Result:
        result = Result(step.name, shlex.join(step.command), "left out", step.proves)
        passed = {other.name for other in self.results if other.status == "passed"}
        missing = [name for name in step.needs if name not in passed]
        result.limit = min(step.seconds, self.end - time.monotonic())
        if missing:
            result.reason = f"needs {', '.join(missing)}"
        elif absent := [name for name in step.modules if importlib.util.find_spec(name) is None]:
            result.status, result.reason = "unsupported", f"not installed: {', '.join(absent)}"
        elif result.limit < LEAST_SECONDS and result.limit < step.seconds:
            result.reason = "no time left"
        else:
            self._execute(step, result, environment)
        return result

    def _execute(self, step: Step, result: Result, environment: Mapping[str, str]) -> None:
        log, xml = self.logs / f"{step.name}.log", self.logs / f"{step.name}.xml"
        command = [*step.command, f"--junit-xml={xml}"] if step.junit else list(step.command)
        start = time.monotonic()
        with log.open("wb") as stream:
            status = run_in_group(command, environment, stream.fileno(), result.limit)
        result.seconds = time.monotonic() - start
        text = log.read_text(errors="replace")
        result.tail = text[-TAIL_CHARACTERS:]
        if step.junit:
            result.tests = read_junit(xml)
        if step.writes is not None:
            result.report = _read_json(step.writes)
        result.status, result.reason = _judge(step, result, status, text)

    def write(self) -> None:
        """The three result files, each replaced as a whole."""
        record = {
            "facts": self.facts,
            "proven": proven(self.results),
            "steps": [asdict(result) for result in self.results],
        }
        _replace(self.out / "proof.json", (json.dumps(record, indent=1) + "\n").encode())
        _replace(self.out / "proof.md", table(self.facts, self.results).encode())
        packed = io.BytesIO()
        with tarfile.open(fileobj=packed, mode="w:gz") as archive:
            archive.add(self.logs, arcname="logs")
        _replace(self.out / "logs.tar.gz", packed.getvalue())


def run_in_group(
    command: list[str], environment: Mapping[str, str], output: int, seconds: float
) -> int | str:
    """Exit status, or why there is none: ``killed`` after ``seconds`` with all its descendants,
    or what kept it from starting."""
    try:
        process = subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            process_group=0,
        )
    except OSError as error:
        return str(error)
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        return "killed"
    finally:
        # What outlives its parent would take the GPU's time and memory from the next step.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        # It can be stuck in the driver, where no signal reaches it.
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(SETTLE_SECONDS)


def read_junit(path: Path) -> dict[str, Any]:
    """Counts of passed, failed and skipped tests, names of the first failures, and the skips'
    reasons; empty without a report."""
    try:
        cases = list(ElementTree.parse(path).getroot().iter("testcase"))
    except (OSError, ElementTree.ParseError):
        return {}
    failed = [
        case for case in cases if case.find("failure") is not None or case.find("error") is not None
    ]
    skipped = [case for case in cases if case.find("skipped") is not None]
    reasons = {str(skip.get("message")) for case in skipped for skip in case.iter("skipped")}
    names = [f"{case.get('classname')}::{case.get('name')}" for case in failed]
    return {
        "passed": len(cases) - len(failed) - len(skipped),
        "failed": len(failed),
        "skipped": len(skipped),
        "failures": names[:MOST_NAMES],
        "skip_reasons": sorted(reasons)[:MOST_NAMES],
    }


def proven(results: list[Result]) -> bool:
    """Whether something was proven, and every step that proves something passed."""
    proofs = [result for result in results if result.proves]
    return bool(proofs) and all(result.status == "passed" for result in proofs)


def table(facts: Mapping[str, Any], results: list[Result]) -> str:
    """The results as Markdown."""
    machine = next((result.report for result in results if result.name == "facts"), None) or {}
    lines = [
        f"- {name}: {value}"
        for name, value in {**facts, **machine}.items()
        if isinstance(value, str | int | float)
    ]
    lines += ["", "| step | result | seconds | tests | what |", "|---|---|---|---|---|"]
    for result in results:
        tests = ", ".join(
            f"{result.tests[kind]} {kind}"
            for kind in ("passed", "failed", "skipped")
            if result.tests.get(kind)
        )
        what = result.reason or ", ".join(result.tests.get("skip_reasons", [])[:3])
        cells = (
            result.name,
            result.status,
            f"{result.seconds:.0f} of {result.limit:.0f}",
            tests,
            what.replace("|", "\\|"),
        )
        lines.append(f"| {' | '.join(cells)} |")
    return (
        "\n".join(
            [*lines, "", "Everything proven." if proven(results) else "Not everything proven."]
        )
        + "\n"
    )


def _judge(step: Step, result: Result, status: int | str, text: str) -> tuple[str, str]:
    last = re.sub(r"\s+", " ", text.strip().rpartition("\n")[2])[:300]
    if status == "killed":
        return "killed", f"after {result.limit:.0f} s"
    if isinstance(status, str):
        return "failed", status
    if status == UNSUPPORTED:
        return "unsupported", last
    if status:
        return "failed", f"exit status {status}: {last}"
    if step.junit and not result.tests.get("passed"):
        return "failed", "pytest ran no test that passed"
    if step.writes is not None and result.report is None:
        return "failed", f"wrote no {step.writes.name}"
    return "passed", ""


def _breaks(result: Result) -> bool:
    return result.status == "failed" or (result.proves and result.status in ("killed", "left out"))


def _line(result: Result) -> str:
    tests = " ".join(
        f"{count} {kind}" for kind, count in result.tests.items() if isinstance(count, int)
    )
    outcome = f"{result.name:<20} {result.status:<12} {result.seconds:6.1f} s"
    return f"{outcome}  {tests} {result.reason}".rstrip()


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None


def _replace(path: Path, content: bytes) -> None:
    temporary = path.with_name(f".{path.name}.new")
    temporary.write_bytes(content)
    temporary.replace(path)
