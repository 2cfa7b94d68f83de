# SPDX-License-Identifier: Apache-2.0
"""Compile the CUDA kernels for every architecture and assert on their machine code; no GPU is
needed.

``check_sass.py`` writes docs/sass.md, ``--check`` compares it instead. What must hold: the int4
kernels of sm_80 use the native MMA, those of sm_90 use wgmma that ptxas did not serialize, no
matrix kernel calls an emulation or computes with floats in its main loop, none spills.
"""

import argparse
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import nvcc
import sass_loops

REPOSITORY = nvcc.FOLDER.parents[1]
PAGE = REPOSITORY / "docs" / "sass.md"
INSTRUCTIONS = {
    "s4 MMA": r"\bIMMA\.\d+\.S4\.S4",
    "s8 MMA": r"\bIMMA\.\d+\.S8\.S8",
    "wgmma": r"\bIGMMA\.",
    "calls": r"\bCALL\b",
    "spills": r"\b(?:LDL|STL)\b",
}
SERIALIZED = "C7510"
MOST_REGISTERS = 255
BOTH_PACKED = "CodesE0ELS2_0E"
"""Of a mangled name: packed codes and packed weights."""
LOOPS = ("main loops", "floats in them")


@dataclass(frozen=True)
class Kernel:
    """One kernel of one architecture: registers a thread, bytes of stack, instructions counted in
    its code, main loops, and instructions on floats in these."""

    source: str
    architecture: str
    name: str
    registers: int
    stack: int
    counts: dict[str, int]
    loops: int = 0
    loop_floats: int = 0

    def problems(self) -> list[str]:
        """What must not be, in words."""
        found = []
        multiplies = self.source.startswith(("cutlass", "gemm")) and "combine" not in self.name
        if self.counts["spills"] or self.stack:
            found.append(f"{self.counts['spills']} spills, {self.stack} bytes of stack")
        later = int(self.architecture.rstrip("af")) >= 90
        # Elsewhere a call is a 64-bit division; here it would be the emulated int4 MMA.
        if multiplies and later and self.counts["calls"]:
            found.append(f"{self.counts['calls']} calls, expected none")
        if self.registers > MOST_REGISTERS:
            found.append(f"{self.registers} registers")
        if multiplies and not self.loops:
            found.append("no main loop")
        if self.loop_floats:
            found.append(f"{self.loop_floats} instructions on floats in main loops")
        tiled = "s4 MMA" if BOTH_PACKED in self.name and not later else "s8 MMA"
        wanted = {
            "cutlass_sm80": "s4 MMA",
            "cutlass_sm90": "wgmma",
            "gemm_s8": tiled,
            "gemm_experts": tiled,
        }
        for prefix, instruction in wanted.items():
            if multiplies and self.source.startswith(prefix) and not self.counts[instruction]:
                found.append(f"no {instruction}")
        if later and self.counts["s4 MMA"]:
            found.append("an s4 MMA, which is emulated here")
        return [f"{self.source} sm_{self.architecture} {self.name}: {problem}" for problem in found]


def find_cuobjdump() -> str:
    """On PATH, or from the package nvidia-cuda-cuobjdump.

    Raises:
        NvccError: neither is there.
    """
    packaged = [Path(p) / "nvidia" for p in sys.path]
    found = shutil.which("cuobjdump") or next(
        (str(f) for p in packaged for f in p.glob("cu*/bin/cuobjdump")), None
    )
    if found is None:
        raise nvcc.NvccError(
            "cuobjdump: expected on PATH, found none. pip install nvidia-cuda-cuobjdump"
            " nvidia-cuda-nvdisasm"
        )
    return found


def read_kernels(tool: str, obj: Path, source: str, architecture: str) -> list[Kernel]:
    """Every kernel of one architecture in an object file."""

    def run(what: str) -> str:
        call = [tool, what, "-arch", f"sm_{architecture}", str(obj)]
        return subprocess.run(call, capture_output=True, text=True, check=True).stdout

    usage = {}
    for name, registers, stack in re.findall(
        r"Function (\S+):\s+REG:(\d+) STACK:(\d+)", run("-res-usage")
    ):
        usage[name] = (int(registers), int(stack))
    kernels = []
    for part in run("-sass").split("Function : ")[1:]:
        name, _, code = part.partition("\n")
        name = name.strip()
        counts = {label: len(re.findall(pattern, code)) for label, pattern in INSTRUCTIONS.items()}
        kernels.append(
            Kernel(source, architecture, name, *usage[name], counts, *sass_loops.main_loops(code))
        )
    return kernels


def short_name(mangled: str) -> str:
    """Enough of a kernel's name to tell it from the others of its file."""
    if "cutlass" in mangled:
        return "bfloat16" if "bfloat16_t" in mangled else "float16"
    shown = subprocess.run(
        ["c++filt", "-p", mangled], capture_output=True, text=True, check=True
    ).stdout.strip()
    return re.sub(r"smoothrot::(cuda::)?|\(anonymous namespace\)::", "", shown)


def inspect(units: list[nvcc.Unit], compiler: str, folder: Path) -> tuple[list[Kernel], list[str]]:
    """Compile the units; their kernels, and all that is wrong with them."""
    kernels: list[Kernel] = []
    problems = []
    tool = find_cuobjdump()
    for unit, obj in zip(units, nvcc.compile_units(compiler, units, folder), strict=True):
        if SERIALIZED in obj.with_suffix(".log").read_text():
            problems.append(f"{unit.source.name}: ptxas serialized wgmma ({SERIALIZED})")
        for architecture in unit.architectures:
            kernels += read_kernels(tool, obj, unit.source.name, architecture)
    if not kernels:
        problems.append("no kernel was compiled")
    return kernels, problems + [problem for kernel in kernels for problem in kernel.problems()]


def page(kernels: list[Kernel]) -> str:
    """docs/sass.md."""
    head = ["source", "sm", "kernel", "registers", "stack", *INSTRUCTIONS, *LOOPS]
    rows = sorted(
        [
            k.source,
            k.architecture,
            f"`{short_name(k.name)}`",
            str(k.registers),
            str(k.stack),
            *map(str, (*k.counts.values(), k.loops, k.loop_floats)),
        ]
        for k in kernels
    )
    table = ["| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows)]
    return "\n".join(
        [
            "# Machine code of the CUDA kernels",
            "",
            "Written by `make sass`, compared by `make check-cuda`, from what nvcc 13.0 compiled.",
            "Counts are of instructions; a main loop is an innermost one that multiplies matrices.",
            "",
            *table,
            "",
        ]
    )


def main() -> None:
    """Compile, assert, and write or compare the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--check", action="store_true", help="compare docs/sass.md instead of writing it"
    )
    args = parser.parse_args()
    compiler = nvcc.find_nvcc()
    if compiler is None:
        sys.exit("check-cuda: expected nvcc on PATH or in CUDA_HOME, found none.")
    units = nvcc.units(nvcc.architectures(compiler))
    kernels, problems = inspect(units, compiler, REPOSITORY / "build" / "cuda")
    text = page(kernels)
    if args.check and (not PAGE.exists() or PAGE.read_text() != text):
        problems.append(
            f"{PAGE.name} is not what the kernels compile to: run make sass and commit it"
        )
    if problems:
        sys.exit("\n".join(problems))
    if not args.check:
        PAGE.write_text(text)
    print(f"{len(kernels)} kernels: no spills, no emulation, no floats in main loops")


if __name__ == "__main__":
    main()
