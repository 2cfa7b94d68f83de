# SPDX-License-Identifier: Apache-2.0
"""Runs the whole suite as two pytest processes at once: most tests that run vLLM, and the others.

Every line begins with whose it is. Arguments are passed to both; fails if either does.
"""

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

TESTS = Path(__file__).parent
SERVING = ("e2e", "plugin")
"""Folders of the first process,"""
BESIDE = ("test_smollm2.py", "test_wheel.py")
"""without these files of theirs: the halves then take about as long."""


def halves(tests: Path = TESTS) -> dict[str, list[str]]:
    """Arguments that choose the tests of each process: between them every test, none twice."""
    files = [
        str(file)
        for folder in SERVING
        for file in sorted((tests / folder).glob("test_*.py"))
        if file.name not in BESIDE
    ]
    return {"vllm": files, "rest": [str(tests), *(f"--ignore={file}" for file in files)]}


def run(name: str, arguments: list[str]) -> int:
    """Exit status of one pytest, whose lines are shown as they come."""
    command = [sys.executable, "-m", "pytest", *arguments]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert process.stdout is not None
    with process:
        for line in process.stdout:
            sys.stdout.write(f"{name} | {line}")
            sys.stdout.flush()
    return process.returncode


def main(arguments: list[str]) -> int:
    """Exit status: 0 if both processes passed."""
    with ThreadPoolExecutor() as pool:
        jobs = [pool.submit(run, name, [*own, *arguments]) for name, own in halves().items()]
        statuses = [job.result() for job in jobs]
    return max(statuses)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
