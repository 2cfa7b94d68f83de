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

from gpu_bundle import PYTHON as BUNDLED
from gpu_bundle import ROOT, WHEELS, source_hash
from lane import Lane, Step

PYTHON = sys.executable
BENCHMARKS = Path(__file__).resolve().parent
EMULATED = "90"
"""Capability of the rehearsal's make-believe GPU; tests/cuda has the others."""
# Some of each kind: all of them take minutes on the emulator, and `make test` runs them there.
REHEARSED_OPS = (
    "test_hadamard_quant or test_linear and 4-8 or test_experts and 4-8-dtype1 or refused"
)
REHEARSED_KERNELS = "TestSmallKernels and not quantizes and not (w4a8 or w8a4 or w8a8)"
REHEARSAL_SECONDS = 300
"""Limit of each of its steps: it may run beside others, on machines of any speed."""


def script(name: str, *arguments: str | Path) -> tuple[str, ...]:
    """A command of this folder."""
    return (PYTHON, str(BENCHMARKS / name), *map(str, arguments))


def pytest(*arguments: str) -> tuple[str, ...]:
    """Tests of tests/gpu, on the GPU."""
    return (PYTHON, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments)


def rehearsed(*arguments: str) -> tuple[str, ...]:
    """The same on the emulated GPU."""
    return pytest("--emulated", EMULATED, *arguments)


def wheels(bundle: Path, site: Path) -> Step:
    """Unpacks the bundle's packages beside those of the machine, which stay as they are."""
    install = (
        "install",
        "-q",
        "--no-index",
        "--no-deps",
        "--no-compile",
        "--disable-pip-version-check",
        "--target",
        str(site),
    )
    found = sorted(map(str, (bundle / WHEELS).glob("*.whl")))
    return Step("wheels", (PYTHON, "-m", "pip", *install, *found), 60, proves=False)


def proof_steps(bundle: Path, out: Path, work: Path, site: Path) -> list[Step]:
    """In order of worth. The limits are together more than the whole time: those of what hangs,
    not of what is expected."""
    facts, library = work / "facts.json", work / "library.json"
    kernels, decode, cpu = out / "kernels.json", out / "decode.json", out / "kernels-cpu.json"
    built = ("library",)
    unpacked = [wheels(bundle, site)] if bundle.exists() else []
    return [
        Step("facts", script("gpu_facts.py", facts), 40, writes=facts, proves=False),
        *unpacked,
        Step(
            "library",
            script("gpu_library.py", "--bundle", bundle, "--json", library),
            240,
            writes=library,
        ),
        Step("kernels", pytest("tests/gpu/test_gpu_kernels.py"), 120, built, junit=True),
        Step("ops", pytest("tests/gpu/test_gpu_ops.py"), 90, built, junit=True),
        Step("runtime", pytest("tests/gpu/test_gpu_runtime.py"), 60, built, junit=True),
        Step(
            "kernel-benchmark",
            script("kernels.py", "--device", "cuda", "--minutes", "1.2", "--json", kernels),
            110,
            built,
            proves=False,
            writes=kernels,
        ),
        Step(
            "decode-benchmark",
            script("decode.py", "--device", "cuda", "--minutes", "1.2", "--json", decode),
            120,
            built,
            proves=False,
            writes=decode,
        ),
        *(
            Step(tool, script("gpu_sanitizer.py", tool), 75, built)
            for tool in ("memcheck", "racecheck", "synccheck")
        ),
        Step("converter", pytest("tests/gpu/test_gpu_converter.py"), 90, built, junit=True),
        Step("cpu", pytest("tests/kernels", "-x"), 60, built, junit=True),
        Step(
            "cpu-benchmark",
            script("kernels.py", "--device", "cpu", "--minutes", "0.6", "--json", cpu),
            60,
            built,
            proves=False,
            writes=cpu,
        ),
        Step(
            "serving",
            pytest("tests/gpu/test_gpu_serving.py"),
            400,
            built,
            proves=False,
            junit=True,
            modules=("vllm",),
        ),
    ]


def rehearsal_steps(bundle: Path, out: Path, work: Path, site: Path) -> list[Step]:
    """The same steps as far as a machine without a GPU can take them."""
    facts, library = work / "facts.json", work / "library.json"
    kernels, decode, cpu = out / "kernels.json", out / "decode.json", out / "kernels-cpu.json"
    built, limit = ("library",), REHEARSAL_SECONDS
    smallest = (
        "--models",
        "SmolLM2-135M",
        "--tokens",
        "1",
        "--rounds",
        "1",
        "--seconds",
        "0.01",
        "--minutes",
        "0.2",
    )
    # Its wheels are for one Python, which the environment of the rehearsal need not be of.
    unpacked = (
        [wheels(bundle, site)]
        if bundle.exists() and platform.python_version().startswith(f"{BUNDLED}.")
        else []
    )
    return [
        Step("facts", script("gpu_facts.py", facts), limit, writes=facts, proves=False),
        *unpacked,
        Step(
            "library",
            script("gpu_library.py", "--rehearse", "--bundle", bundle, "--json", library),
            limit,
            writes=library,
        ),
        Step(
            "kernels",
            rehearsed("tests/gpu/test_gpu_kernels.py", "-k", REHEARSED_KERNELS),
            limit,
            built,
            junit=True,
        ),
        Step(
            "ops",
            rehearsed("tests/gpu/test_gpu_ops.py::TestSmallOps", "-k", REHEARSED_OPS),
            limit,
            built,
            junit=True,
        ),
        Step("runtime", rehearsed("tests/gpu/test_gpu_runtime.py", "--collect-only"), limit, built),
        Step(
            "kernel-benchmark",
            script("kernels.py", "--device", "cuda", "--dry-run", "--json", kernels),
            limit,
            built,
            writes=kernels,
        ),
        Step(
            "decode-benchmark",
            script("decode.py", "--device", "cpu", "--dry-run", "--json", decode),
            limit,
            built,
            writes=decode,
        ),
        *(
            Step(tool, script("gpu_sanitizer.py", tool, "--rehearse"), limit, built)
            for tool in ("memcheck", "racecheck", "synccheck")
        ),
        Step(
            "converter",
            rehearsed("tests/gpu/test_gpu_converter.py", "-k", "llama and rtn"),
            limit,
            built,
            junit=True,
        ),
        Step(
            "cpu",
            pytest("tests/kernels/test_ops.py", "-x", "-k", "hadamard_quant"),
            limit,
            built,
            junit=True,
        ),
        Step(
            "cpu-benchmark",
            script("kernels.py", "--device", "cpu", *smallest, "--json", cpu),
            limit,
            built,
            writes=cpu,
        ),
    ]


def environment(site: Path) -> dict[str, str]:
    """The tree and the bundle's packages importable, without being installed."""
    site.mkdir(parents=True, exist_ok=True)
    (site / "smoothrot_offline").symlink_to(ROOT / "offline")
    inherited = os.environ.get("PYTHONPATH")
    paths = [str(ROOT), str(site), *([inherited] if inherited else [])]
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
    parser.add_argument(
        "--bundle",
        type=Path,
        default=ROOT / "gpu-bundle",
        help="folder that `make gpu-bundle` made",
    )
    parser.add_argument(
        "--out", type=Path, default=ROOT / "gpu-proof", help="folder of the results"
    )
    parser.add_argument(
        "--minutes",
        type=float,
        default=8,
        help="of the whole; later steps are cut or left out, and named",
    )
    parser.add_argument("--dry-run", action="store_true", help="rehearse it without a GPU")
    args = parser.parse_args()
    os.chdir(ROOT)
    # Whoever stops this one must not leave a step running: ending unwinds to where its process
    # group is killed.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    bundle, out = args.bundle.resolve(), args.out.resolve()
    facts = {
        "run": "rehearsal: nothing here ran on a GPU" if args.dry_run else "on a GPU",
        "source_sha256": source_hash(),
        "minutes": args.minutes,
        "bundle": str(args.bundle) if bundle.exists() else "none",
    }
    with tempfile.TemporaryDirectory() as folder:
        work, site = Path(folder), Path(folder) / "site"
        lane = Lane(out, work, args.minutes, facts)
        make = rehearsal_steps if args.dry_run else proof_steps
        return lane.run(make(bundle, out, work, site), environment(site))


if __name__ == "__main__":
    sys.exit(main())
