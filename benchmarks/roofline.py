# SPDX-License-Identifier: Apache-2.0
"""Writes docs/roofline.md: bytes that the hand-written CUDA kernels ask for, counted by the emulator, and their floor.

Needs no GPU and says nothing of speed: a kernel that moves the least it can may still be slow.

    python benchmarks/roofline.py [--multiprocessors 108] [--out docs/roofline.md]
"""

import argparse
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY / "tests" / "emulated"))
from emulator import INT8, PACKED, Emulator, build_emulator  # noqa: E402

from smoothrot_vllm.hadamard import factorize  # noqa: E402

QUANT_TOKENS = 8
WIDTHS = {"Llama-3.2-1B": (2048, 8192), "Llama-3-8B": (4096, 14336), "Qwen2.5-7B": (3584, 18944)}
LINEARS = {"qkv": (6144, 4096), "o": (4096, 4096), "gate_up": (28672, 4096), "down": (4096, 14336)}

PAGE = """# Bytes moved by the hand-written CUDA kernels

Counted by the emulator of `csrc/emulator` in every global load and store of one launch; written by
`benchmarks/roofline.py` for a GPU of {multiprocessors} multiprocessors. The floor is each operand and each result once.
Bytes are those the kernel asks for: what it reads again may come from a cache, so DRAM traffic lies between the two
columns. Nothing here was timed, and no figure here comes from a GPU.

| kernel | shape | bytes | floor | ratio | operations |
|---|---|---:|---:|---:|---:|
{rows}

Operations are float additions of the rotation for quantise kernels (`inputs · (log2 power + base)` a token), int8 or
int4 multiply-adds for GEMMs. GEMMs read activations again for each block of outputs, and `gemm_s8` the weights for each
64 tokens.
"""


@dataclass(frozen=True)
class Row:
    """One launch."""

    kernel: str
    shape: str
    moved: int
    floor: int
    operations: int

    def __str__(self) -> str:
        ratio = self.moved / self.floor
        return f"| {self.kernel} | {self.shape} | {self.moved:,} | {self.floor:,} | {ratio:.3f} | {self.operations:,} |"


def quantise(emulator: Emulator, producer: str, inputs: int, block: int) -> Row:
    """A quantise kernel on bfloat16 rows."""
    x = torch.randn(QUANT_TOKENS, inputs * (2 if producer == "silu_mul" else 1)).bfloat16()
    residual = torch.randn_like(x) if producer == "rms_norm" else None
    emulator.reset()
    codes, scale = emulator.quant(x, 0.9, 4, PACKED, block=block, producer=producer, residual=residual, epsilon=1e-6)
    counters = emulator.counters()
    factors = factorize(block or 1)
    assert factors is not None
    signs = factors.base // 4 * -(-factors.base // 8) * 4
    floor = x.nbytes + codes.nbytes + scale.nbytes + signs + (0 if residual is None else 2 * residual.nbytes)
    additions = QUANT_TOKENS * inputs * (factors.power.bit_length() - 1 + (factors.base if factors.base > 1 else 0))
    name = "_".join(filter(None, (producer, "hadamard" if block else "", "quant")))
    shape = f"{QUANT_TOKENS} x {inputs}" + (f", block {factors}" if block else "")
    return Row(name, shape, counters.loaded + counters.stored, floor, additions)


def multiply(emulator: Emulator, kernel: str, name: str, tokens: int, form: int) -> Row:
    """A GEMM with bfloat16 results."""
    outputs, inputs = LINEARS[name]
    codes = torch.randint(0, 256, (tokens, inputs // 2), dtype=torch.uint8)
    if form == INT8:
        codes = torch.randint(-8, 8, (tokens, inputs), dtype=torch.int8)
    weight = torch.randint(0, 256, (outputs, inputs // 2), dtype=torch.uint8)
    scale, weight_scale = torch.rand(tokens), torch.rand(outputs, 1)
    emulator.reset()
    out = emulator.gemm(kernel, codes, scale, weight, weight_scale, torch.bfloat16)
    counters = emulator.counters()
    floor = sum(t.nbytes for t in (codes, weight, scale, weight_scale, out))
    operands = "int8 x int4" if form == INT8 else "int4 x int4"
    shape = f"{name}, {tokens} x {outputs} x {inputs}"
    moved = counters.loaded + counters.stored
    return Row(f"gemm_{kernel}, {operands}", shape, moved, floor, tokens * outputs * inputs)


def rows(emulator: Emulator) -> Iterator[Row]:
    """Every launch of the table."""
    for hidden, intermediate in WIDTHS.values():
        yield quantise(emulator, "", hidden, 0)
        yield quantise(emulator, "rms_norm", hidden, 0)
        yield quantise(emulator, "", intermediate, intermediate)
        yield quantise(emulator, "silu_mul", intermediate, intermediate)
    for form in (PACKED, INT8):
        for tokens in (1, 8, 16):
            for name in LINEARS:
                yield multiply(emulator, "small", name, tokens, form)
    for form in (PACKED, INT8):
        yield multiply(emulator, "s8", "o", 128, form)


def main() -> None:
    """Run the launches and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--multiprocessors", type=int, default=108, help="of the GPU that launchers choose tiles for")
    parser.add_argument("--out", type=Path, default=REPOSITORY / "docs" / "roofline.md")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        emulator = Emulator(build_emulator(Path(folder) / "emulator.so", native_int4=True))
        with emulator.options(multiprocessors=args.multiprocessors):
            table = "\n".join(map(str, rows(emulator)))
    args.out.write_text(PAGE.format(multiprocessors=args.multiprocessors, rows=table))


if __name__ == "__main__":
    main()
