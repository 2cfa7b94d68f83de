# SPDX-License-Identifier: Apache-2.0
"""compute-sanitizer over the small tests of the ops and of each forced kernel, once it has found a
fault planted for it.

Ends with status 0 where the tests ran without a complaint, 77 where the tool cannot work on this
machine, else 1. torch's caching allocator is off, because it puts tensors side by side in one
allocation, where an overrun meets no boundary.
"""

import argparse
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.gpu.bundle import ROOT
from benchmarks.gpu.lane import UNSUPPORTED

PLANTED = Path(__file__).with_name("planted_faults.cu")
TESTS = (
    "tests/gpu/test_gpu_ops.py::TestSmallOps",
    "tests/gpu/test_gpu_kernels.py::TestSmallKernels",
)
FOUND = 9
"""Exit status of a run with complaints."""
HAND_WRITTEN_ONLY = "racecheck"
"""This tool is left to the hand-written kernels: of CUTLASS's asynchronous barriers it reports
hazards that are none."""


def find_sanitizer() -> str | None:
    """On PATH or in the toolkit."""
    nvcc = shutil.which("nvcc")
    homes = [
        os.environ.get("CUDA_HOME"),
        "/usr/local/cuda",
        nvcc and str(Path(nvcc).resolve().parents[1]),
    ]
    places = [f"{home}/{part}" for home in homes if home for part in ("bin", "compute-sanitizer")]
    return shutil.which(
        "compute-sanitizer", path=os.pathsep.join([os.environ.get("PATH", ""), *places])
    )


def kernel_names() -> list[str]:
    """Of the ``__global__`` functions of csrc/cuda; CUTLASS has its own."""
    text = "\n".join(
        path.read_text()
        for path in sorted((ROOT / "csrc" / "cuda").glob("*.*"))
        if path.suffix in (".h", ".cu")
    )
    return sorted(
        set(re.findall(r"^SMOOTHROT_KERNEL\([^)]*\)\s*(?:void\s+)?(\w+)\(", text, re.MULTILINE))
    )


def looked_at(tool: str) -> list[str]:
    """Parts of the names of the kernels that a tool looks at, none of torch's, which would take
    most of the time."""
    return kernel_names() if tool == HAND_WRITTEN_ONLY else [*kernel_names(), "cutlass"]


def checked(sanitizer: str, tool: str, kernels: list[str], command: list[str]) -> list[str]:
    """The call that runs a command under a tool, which looks at every kernel that one of the
    names is part of."""
    chosen = [f"--kernel-name=kernel_substring={name}" for name in kernels]
    # What the CUDA runtime refuses, the tests report, and torch asks for things that may be
    # refused.
    quiet = ["--report-api-errors=no"] if tool == "memcheck" else []
    return [sanitizer, f"--tool={tool}", f"--error-exitcode={FOUND}", *quiet, *chosen, *command]


def tests_command() -> list[str]:
    """The tests as they run under the tool."""
    return [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *TESTS]


def compile_planted(folder: str) -> Path:
    """The program with the faults, for every architecture that nvcc knows.

    Raises:
        subprocess.CalledProcessError, OSError: nvcc refuses it or is missing.
    """
    program = Path(folder) / "planted"
    subprocess.run(
        ["nvcc", "-std=c++17", "-O1", "-arch=all-major", str(PLANTED), "-o", str(program)],
        check=True,
    )
    return program


def run(command: list[str], **environment: str) -> tuple[int, str]:
    """Exit status and output, which is also printed."""
    print("+", shlex.join(command), flush=True)
    lines = []
    with subprocess.Popen(
        command,
        cwd=ROOT,
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", flush=True)
            lines.append(line)
    return process.returncode, "".join(lines)


def rehearse(tool: str) -> int:
    """Everything short of a GPU: the planted program compiles, pytest collects the tests, the
    calls are printed."""
    with tempfile.TemporaryDirectory() as folder:
        if shutil.which("nvcc"):
            compile_planted(folder)
        else:
            print("nvcc is not here: the planted faults were not compiled")
    status, said = run([*tests_command(), "--emulated", "90", "--collect-only"])
    collected = re.search(r"(\d+) tests collected", said)
    if status or collected is None:
        return 1
    sanitizer = find_sanitizer() or "compute-sanitizer"
    print("would run", shlex.join(checked(sanitizer, tool, [f"planted_{tool}"], ["planted", tool])))
    print("would run", shlex.join(checked(sanitizer, tool, looked_at(tool), tests_command())))
    return 0


def main() -> int:
    """The planted fault, then the tests."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("tool", choices=["memcheck", "synccheck", "racecheck"])
    parser.add_argument("--rehearse", action="store_true", help="without a GPU")
    args = parser.parse_args()
    if args.rehearse:
        return rehearse(args.tool)
    sanitizer = find_sanitizer()
    if sanitizer is None:
        print("compute-sanitizer: expected it on PATH or in the CUDA toolkit, found none")
        return UNSUPPORTED
    with tempfile.TemporaryDirectory() as folder:
        program = str(compile_planted(folder))
        status, said = run(
            checked(sanitizer, args.tool, [f"planted_{args.tool}"], [program, args.tool])
        )
    if "Device not supported" in said:
        print(f"{args.tool}: compute-sanitizer does not support this device or its driver")
        return UNSUPPORTED
    if status != FOUND:
        print(
            f"{args.tool}: expected it to find the fault planted for it (status {FOUND}), got"
            f" status {status}"
        )
        return 1
    status, said = run(
        checked(sanitizer, args.tool, looked_at(args.tool), tests_command()),
        PYTORCH_NO_CUDA_MEMORY_CACHING="1",
    )
    passed = re.search(r"^(\d+) passed.*", said, re.MULTILINE)
    if status or passed is None:
        print(f"{args.tool}: expected no complaint and passed tests, got status {status}")
        return 1
    print(f"{args.tool}: no complaint, {passed[0]}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
