# SPDX-License-Identifier: Apache-2.0
"""``make gpu-proof``: proves every CUDA kernel on a bare machine with a GPU, and measures them, in
a given time.

Needs Python with torch 2.11 or later for CUDA, pytest, pytest-timeout, transformers and
safetensors; no network, no vLLM, nothing installed. What else it needs comes from the bundle that
``make gpu-bundle`` makes, or is built here. Steps run in order of worth, each within its own limit;
a failure does not stop the others. The results are in OUT, whole after each step: ``proof.json``,
``proof.md``, ``logs.tar.gz`` and the reports of the benchmarks. Status 1: a step failed, or a proof
had no time.

``--dry-run`` is the rehearsal without a GPU: the same tests on the emulated kernels, in small
shapes.
"""

import argparse
import os
import platform
import signal
import sys
import tempfile
from pathlib import Path

from benchmarks.gpu.bundle import PYTHON as BUNDLED
from benchmarks.gpu.bundle import ROOT, WHEELS, source_hash
from benchmarks.gpu.lane import Lane, Step

PYTHON = sys.executable
BUILT = ("library",)
SANITIZERS = ("memcheck", "racecheck", "synccheck")
EMULATED = "90"
"""Capability of the rehearsal's make-believe GPU; tests/cuda has the others."""
# Some of each kind: all of them take minutes on the emulator, and `make test` runs them there.
REHEARSED_OPS = (
    "test_hadamard_quant or test_linear and 4-8 or test_experts and 4-8-dtype1 or refused"
)
REHEARSED_KERNELS = "TestSmallKernels and not quantizes and not (w4a8 or w8a4 or w8a8)"
REHEARSAL_SECONDS = 300
"""Limit of each of its steps: it may run beside others, on machines of any speed."""


def module(name: str, *arguments: str | Path) -> tuple[str, ...]:
    """A command of this folder's."""
    return (PYTHON, "-m", f"benchmarks.{name}", *map(str, arguments))


def pytest(*arguments: str) -> tuple[str, ...]:
    """Tests of tests/gpu, on the GPU."""
    return (PYTHON, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments)


def rehearsed(*arguments: str) -> tuple[str, ...]:
    """The same on the emulated GPU."""
    return pytest("--emulated", EMULATED, *arguments)


def tests(name: str, seconds: float, command: tuple[str, ...]) -> Step:
    """Tests that prove something once the library is there."""
    return Step(name, command, seconds, BUILT, junit=True)


def measures(name: str, seconds: float, file: Path, command: tuple[str, ...], proves: bool) -> Step:
    """A benchmark, whose report is a result file."""
    command = (*command, "--json", str(file))
    return Step(name, command, seconds, BUILT, proves=proves, writes=file)


def facts(work: Path, seconds: float) -> Step:
    """What the machine is."""
    file = work / "facts.json"
    return Step("facts", module("gpu.facts", file), seconds, writes=file, proves=False)


def wheels(bundle: Path, site: Path) -> Step:
    """Unpacks the bundle's packages beside those of the machine, which stay as they are."""
    found = sorted(map(str, (bundle / WHEELS).glob("*.whl")))
    command = [PYTHON, "-m", "pip", "install", "-q", "--no-index", "--no-deps", "--no-compile"]
    command += ["--disable-pip-version-check", "--target", str(site), *found]
    return Step("wheels", tuple(command), 60, proves=False)


def library(bundle: Path, work: Path, seconds: float, *words: str) -> Step:
    """The CUDA library in its place."""
    file = work / "library.json"
    command = module("gpu.library", *words, "--bundle", bundle, "--json", file)
    return Step("library", command, seconds, writes=file)


def proof_steps(bundle: Path, out: Path, work: Path, site: Path) -> list[Step]:
    """In order of worth. The limits are together more than the whole time: those of what hangs,
    not of what is expected."""
    kernels = module("kernels.layers", "--device", "cuda", "--minutes", "1.2")
    decode = module("kernels.decode", "--minutes", "1.2")
    cpu = module("kernels.layers", "--device", "cpu", "--minutes", "0.6")
    serving = pytest("tests/gpu/test_gpu_serving.py")
    return [
        facts(work, 40),
        *([wheels(bundle, site)] if bundle.exists() else []),
        library(bundle, work, 240),
        tests("kernels", 120, pytest("tests/gpu/test_gpu_kernels.py")),
        tests("ops", 90, pytest("tests/gpu/test_gpu_ops.py")),
        tests("runtime", 60, pytest("tests/gpu/test_gpu_runtime.py")),
        measures("kernel-benchmark", 110, out / "kernels.json", kernels, proves=False),
        measures("decode-benchmark", 120, out / "decode.json", decode, proves=False),
        *(Step(tool, module("gpu.sanitizer", tool), 75, BUILT) for tool in SANITIZERS),
        tests("converter", 90, pytest("tests/gpu/test_gpu_converter.py")),
        tests("cpu", 60, pytest("tests/kernels", "-x")),
        measures("cpu-benchmark", 60, out / "kernels-cpu.json", cpu, proves=False),
        Step("serving", serving, 400, BUILT, proves=False, junit=True, modules=("vllm",)),
    ]


def rehearsal_steps(bundle: Path, out: Path, work: Path, site: Path) -> list[Step]:
    """The same steps as far as a machine without a GPU can take them."""
    limit = REHEARSAL_SECONDS
    kernels = module("kernels.layers", "--device", "cuda", "--dry-run")
    decode = module("kernels.decode", "--dry-run")
    smallest = ("--models", "SmolLM2-135M", "--tokens", "1", "--rounds", "1")
    cpu = module("kernels.layers", *smallest, "--seconds", "0.01", "--minutes", "0.2")
    small_kernels = rehearsed("tests/gpu/test_gpu_kernels.py", "-k", REHEARSED_KERNELS)
    small_ops = rehearsed("tests/gpu/test_gpu_ops.py::TestSmallOps", "-k", REHEARSED_OPS)
    runtime = rehearsed("tests/gpu/test_gpu_runtime.py", "--collect-only")
    converter = rehearsed("tests/gpu/test_gpu_converter.py", "-k", "llama and rtn")
    # Its wheels are for one Python, which the environment of the rehearsal need not be of.
    unpack = bundle.exists() and platform.python_version().startswith(f"{BUNDLED}.")
    return [
        facts(work, limit),
        *([wheels(bundle, site)] if unpack else []),
        library(bundle, work, limit, "--rehearse"),
        tests("kernels", limit, small_kernels),
        tests("ops", limit, small_ops),
        Step("runtime", runtime, limit, BUILT),
        measures("kernel-benchmark", limit, out / "kernels.json", kernels, proves=True),
        measures("decode-benchmark", limit, out / "decode.json", decode, proves=True),
        *(
            Step(tool, module("gpu.sanitizer", tool, "--rehearse"), limit, BUILT)
            for tool in SANITIZERS
        ),
        tests("converter", limit, converter),
        tests("cpu", limit, pytest("tests/kernels/test_ops.py", "-x", "-k", "hadamard_quant")),
        measures("cpu-benchmark", limit, out / "kernels-cpu.json", cpu, proves=True),
    ]


def environment(site: Path) -> dict[str, str]:
    """The tree and the bundle's packages importable, without being installed."""
    inherited = os.environ.get("PYTHONPATH")
    paths = [str(ROOT), str(ROOT / "offline"), str(site), *([inherited] if inherited else [])]
    return os.environ | {
        "PYTHONPATH": os.pathsep.join(paths),
        "PYTHONUNBUFFERED": "1",
        "PYTHONDONTWRITEBYTECODE": "1",
    }


def main() -> int:
    """Run the steps; the status says whether all is proven."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--bundle", type=Path, default=ROOT / "gpu-bundle", help="that `make gpu-bundle` made")
    add("--out", type=Path, default=ROOT / "gpu-proof", help="folder of the results")
    minutes = "of the whole; later steps are cut or left out, and named"
    add("--minutes", type=float, default=8, help=minutes)
    add("--dry-run", action="store_true", help="rehearse it without a GPU")
    args = parser.parse_args()
    os.chdir(ROOT)
    # Whoever stops this one must not leave a step running: ending unwinds to where its process
    # group is killed.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    bundle, out = args.bundle.resolve(), args.out.resolve()
    about = {
        "run": "rehearsal: nothing here ran on a GPU" if args.dry_run else "on a GPU",
        "source_sha256": source_hash(),
        "minutes": args.minutes,
        "bundle": str(args.bundle) if bundle.exists() else "none",
    }
    with tempfile.TemporaryDirectory() as folder:
        work, site = Path(folder), Path(folder) / "site"
        lane = Lane(out, work, args.minutes, about)
        make = rehearsal_steps if args.dry_run else proof_steps
        return lane.run(make(bundle, out, work, site), environment(site))


if __name__ == "__main__":
    sys.exit(main())
