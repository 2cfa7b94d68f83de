# SPDX-License-Identifier: Apache-2.0
"""Writes docs/roofline.md: bytes that the hand-written CUDA kernels move, counted by the emulator,
and their floor.

Needs no GPU and says nothing of speed: a kernel that moves the least it can may still be slow.

    python tests/emulated/roofline.py [--multiprocessors 108] [--out docs/roofline.md]
"""

import argparse
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from emulator import GROUPS_OF_A_WORD, INT8, PACKED, Emulator, build_emulator

from smoothrot_vllm.grouped_experts import Route
from smoothrot_vllm.hadamard import factorize

REPOSITORY = Path(__file__).resolve().parents[2]

QUANT_TOKENS = 8
WIDTHS = {"Llama-3.2-1B": (2048, 8192), "Llama-3-8B": (4096, 14336), "Qwen2.5-7B": (3584, 18944)}
CACHE_BYTES = 4 << 20
"""The smallest second-level cache of a supported GPU that we know of: Jetson Orin's (sm_87). Not
looked up or measured."""
LINEARS = {"qkv": (6144, 4096), "o": (4096, 4096), "gate_up": (28672, 4096), "down": (4096, 14336)}
EXPERTS, TOP_K = 128, 8
EXPERT_LINEARS = {"gate_up": (1536, 2048), "down": (2048, 768)}
"""Outputs and inputs of an expert of Qwen3-30B-A3B."""

PAGE = """# Bytes moved by the hand-written CUDA kernels

Counted by the emulator of `csrc/emulator` in every global load and store of one launch; written by
`tests/emulated/roofline.py` for a GPU of {multiprocessors} multiprocessors. **Nothing here was
timed, and no figure here comes from a GPU.** The floor is each operand and each result once. Two
numbers are held against it:

- *DRAM*: the same loads replayed through a model of the second-level cache of {cache_mib} MiB
  (32-byte sectors, least recently used leaves), once with a block on each multiprocessor, all at
  the same pace, and once with one block after the other; the larger counts. Stores count once.
  {cache_mib} MiB is what a Jetson Orin (sm_87) has, the smallest cache of a supported GPU that we
  know of; it was not looked up or measured.
- *requested*: what the multiprocessors ask the second-level cache for.

| kernel | shape | floor | DRAM | ratio | requested | ratio | operations |
|---|---|---:|---:|---:|---:|---:|---:|
{rows}

Operations are float additions of the rotation for quantize kernels (`inputs · (log2 power + base)`
a token), int8 or int4 multiply-adds for GEMMs.

What is requested beyond the floor is read again: by GEMMs the activations, once for each block of
outputs, and by `gemm_s8` the weights, once for each 64 tokens. `gemm_experts` reads the weights of
an expert once for each 64 of its tokens and those of unchosen experts never; each thread asks for
the 12 bytes that say which expert its block is of, surplus blocks included. The experts are those
of Qwen3-30B-A3B, 8 of 128 for each token. Group scales are counted for each lane that asks for its
word, which `gemm_small` has up to four lanes do at once and the others do again at each step of 128
inputs: the first-level cache, which is not modeled, serves all but the first. With groups of 32
`gemm_small` seems to take a fifth more than the floor from DRAM: the emulator runs the eight warps
of a block one after the other, and each finds that the modeled cache has lost the group scales that
it shares with the one before. On a GPU they run side by side.

For `gemm_small` without groups the surplus over the weights' bytes is `tokens / outputs a block *
activation bits / weight bits`, whatever the layer. At 16 tokens of int4 codes 64 outputs a block
ask for 25 % more and 128 for 12.5 %, and int8 codes for twice that, as the table shows. To stay
within 10 % a block would have to hold 160 outputs, 320 with int8 codes. On Llama-3-8B that leaves
so few blocks that most of {multiprocessors} multiprocessors have none:

| blocks at 16 tokens | qkv | o | gate_up | down |
|---|---:|---:|---:|---:|
| int4 x int4, as launched | 96 | 64 | 224 | 64 |
| int4 x int4, requests within 10 % | 39 | 26 | 180 | 26 |
| int8 x int4, requests within 10 % | 20 | 13 | 90 | 13 |

Splitting the inputs between blocks gives the idle multiprocessors work without more activations,
but adds 8 bytes of partial sum per output, token and further split: `16 * tokens / inputs` of the
weights' bytes, 6.25 % each at 16 tokens and 4096 inputs. On `qkv` and `o` a split in two that stays
within 10 % has fewer blocks still, 30 and 20. `down` would be at 9.8 % with 48 blocks of 256
outputs by a third of the inputs, `gate_up` at 6.3 % with 112 blocks of 256 outputs. A warp that
holds 128 outputs of 16 tokens takes 186 to 214 registers with packed codes ([sass.md](sass.md)), so
such blocks would have to share activations between two groups of warps through shared memory.
Thread-block clusters could multicast them, on sm_90 and later only.

None of this was done: the activations, 32 to 229 KB, stay in every cache above while weights pass
through, so the surplus never reaches DRAM, and DRAM stays the limit as long as the second-level
cache gives 1.5 times as many bytes a second. Fewer blocks would give up multiprocessors for it.
Whether that trade is right has to be measured on a GPU. What cost nothing was taken: 4-bit
activations go to `gemm_small` packed on every architecture, half the bytes of int8 codes.
"""


@dataclass(frozen=True)
class Row:
    """One launch."""

    kernel: str
    shape: str
    floor: int
    dram: int
    requested: int
    operations: int

    def __str__(self) -> str:
        cells = [self.kernel, self.shape, f"{self.floor:,}"]
        for moved in (self.dram, self.requested):
            cells += [f"{moved:,}", f"{moved / self.floor:.3f}"]
        return "| " + " | ".join([*cells, f"{self.operations:,}"]) + " |"


def traffic(emulator: Emulator) -> tuple[int, int]:
    """Bytes of the last launch: through the cache from and to DRAM, and those asked for."""
    counters = emulator.counters()
    resident = emulator.option("multiprocessors")
    loaded = max(emulator.dram_loaded(CACHE_BYTES, blocks) for blocks in (1, resident))
    return loaded + counters.stored, counters.loaded + counters.stored


def quantize(emulator: Emulator, producer: str, inputs: int, block: int) -> Row:
    """A quantize kernel on bfloat16 rows."""
    x = torch.randn(QUANT_TOKENS, inputs * (2 if producer == "silu_mul" else 1)).bfloat16()
    residual = torch.randn_like(x) if producer == "rms_norm" else None
    emulator.reset()
    codes, scale = emulator.quant(
        x, 0.9, 4, PACKED, block=block, producer=producer, residual=residual, epsilon=1e-6
    )
    factors = factorize(block or 1)
    assert factors is not None
    signs = factors.base // 4 * -(-factors.base // 8) * 4
    floor = (
        x.nbytes
        + codes.nbytes
        + scale.nbytes
        + signs
        + (0 if residual is None else 2 * residual.nbytes)
    )
    additions = (
        QUANT_TOKENS
        * inputs
        * (factors.power.bit_length() - 1 + (factors.base if factors.base > 1 else 0))
    )
    name = "_".join(filter(None, (producer, "hadamard" if block else "", "quant")))
    shape = f"{QUANT_TOKENS} x {inputs}" + (f", block {factors}" if block else "")
    return Row(name, shape, floor, *traffic(emulator), additions)


def group_scales(group: int | None, *sizes: int) -> torch.Tensor | None:
    """Random ones of outputs by inputs, the last of the sizes."""
    if group is None:
        return None
    return torch.randint(1, 16, (*sizes[:-1], sizes[-1] // group), dtype=torch.uint8)


def scale_bytes(group_scale: torch.Tensor | None) -> int:
    """What group scales take: a nibble each, a row whole words."""
    if group_scale is None:
        return 0
    groups = group_scale.shape[-1]
    return group_scale.numel() // groups * -(-groups // GROUPS_OF_A_WORD) * 4


def multiply(
    emulator: Emulator,
    kernel: str,
    name: str,
    tokens: int,
    form: int,
    weight_bits: int = 4,
    group: int | None = None,
) -> Row:
    """A GEMM with bfloat16 results."""
    outputs, inputs = LINEARS[name]
    codes = torch.randint(0, 256, (tokens, inputs // 2), dtype=torch.uint8)
    if form == INT8:
        codes = torch.randint(-8, 8, (tokens, inputs), dtype=torch.int8)
    weight = torch.randint(0, 256, (outputs, inputs // 2), dtype=torch.uint8)
    if weight_bits == 8:
        weight = torch.randint(-128, 128, (outputs, inputs), dtype=torch.int8)
    scale, weight_scale = torch.rand(tokens), torch.rand(outputs, 1)
    group_scale = group_scales(group, outputs, inputs)
    emulator.reset()
    out = emulator.gemm(
        kernel, codes, scale, weight, weight_scale, torch.bfloat16, group_scale=group_scale
    )
    floor = sum(t.nbytes for t in (codes, weight, scale, weight_scale, out))
    floor += scale_bytes(group_scale)
    operands = f"{'int8' if form == INT8 else 'int4'} x int{weight_bits}"
    if group is not None:
        operands += f" in groups of {group}"
    shape = f"{name}, {tokens} x {outputs} x {inputs}"
    return Row(
        f"gemm_{kernel}, {operands}", shape, floor, *traffic(emulator), tokens * outputs * inputs
    )


def multiply_experts(emulator: Emulator, name: str, tokens: int, group: int | None = None) -> Row:
    """The GEMM of all experts that ``tokens`` tokens chose at random, W4A4 with bfloat16
    results."""
    outputs, inputs = EXPERT_LINEARS[name]
    chosen = (
        torch.rand(tokens, EXPERTS, generator=torch.Generator().manual_seed(tokens))
        .topk(TOP_K)
        .indices
    )
    used = len(chosen.unique())
    codes = torch.randint(0, 256, (tokens * TOP_K, inputs // 2), dtype=torch.uint8)
    weight = torch.randint(0, 256, (EXPERTS, outputs, inputs // 2), dtype=torch.uint8)
    scale, weight_scale = torch.rand(len(codes)), torch.rand(EXPERTS, outputs, 1)
    group_scale = group_scales(group, EXPERTS, outputs, inputs)
    tiles = Route.of(chosen, EXPERTS).tiles
    emulator.reset()
    arguments = (codes, scale, weight, weight_scale, torch.bfloat16)
    out = emulator.gemm("experts", *arguments, tiles=tiles, group_scale=group_scale)
    own = weight[0].nbytes + weight_scale[0].nbytes + scale_bytes(group_scale) // EXPERTS
    read = sum(t.nbytes for t in (codes, scale, tiles, out)) + used * own
    operands = "int4 x int4" + ("" if group is None else f" in groups of {group}")
    shape = f"{name} of {used} experts, {len(codes)} rows x {outputs} x {inputs}"
    return Row(
        f"gemm_experts, {operands}", shape, read, *traffic(emulator), len(codes) * outputs * inputs
    )


def rows(emulator: Emulator) -> Iterator[Row]:
    """Every launch of the table."""
    for hidden, intermediate in WIDTHS.values():
        yield quantize(emulator, "", hidden, 0)
        yield quantize(emulator, "rms_norm", hidden, 0)
        yield quantize(emulator, "", intermediate, intermediate)
        yield quantize(emulator, "silu_mul", intermediate, intermediate)
    operands = [(PACKED, 4), (INT8, 4), (INT8, 8)]
    for form, weight_bits in operands:
        for tokens in (1, 8, 16):
            for name in LINEARS:
                yield multiply(emulator, "small", name, tokens, form, weight_bits)
    for form, weight_bits in operands:
        yield multiply(emulator, "s8", "o", 128, form, weight_bits)
    for group in (32, 128):
        for form in (PACKED, INT8):
            for tokens in (1, 16):
                yield multiply(emulator, "small", "down", tokens, form, group=group)
            yield multiply(emulator, "s8", "o", 128, form, group=group)
    for tokens in (1, 4):
        for name in EXPERT_LINEARS:
            yield multiply_experts(emulator, name, tokens)
            yield multiply_experts(emulator, name, tokens, 32)


def main() -> None:
    """Run the launches and write the page."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--multiprocessors",
        type=int,
        default=108,
        help="of the GPU that launchers choose tiles for",
    )
    parser.add_argument("--out", type=Path, default=REPOSITORY / "docs" / "roofline.md")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        emulator = Emulator(build_emulator(Path(folder) / "emulator.so", native_int4=True))
        with emulator.options(multiprocessors=args.multiprocessors, trace=1):
            table = "\n".join(map(str, rows(emulator)))
    args.out.write_text(
        PAGE.format(multiprocessors=args.multiprocessors, cache_mib=CACHE_BYTES >> 20, rows=table)
    )


if __name__ == "__main__":
    main()
