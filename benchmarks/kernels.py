# SPDX-License-Identifier: Apache-2.0
"""Op-level speed: our linear layers beside torch's bf16 and vLLM's own int8 W8A8, and beside what the machine can do.

Contenders run alternately in one process on the same shapes. Weights are rotated through more copies than the
last-level cache holds, because a served model never finds a layer's weights in cache.
"""

import argparse
import itertools
import json
import sys
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common import CLOCKS, Floors, Timing, machine, measure_floors, packages, time_alternately
from rich.console import Console
from rich.table import Table

from smoothrot_vllm import ops

# Linears of a decoder layer as (outputs, inputs), fused as vLLM fuses them; the last is down_proj, which is rotated.
MODELS = {
    "SmolLM2-135M": [(960, 576), (576, 576), (3072, 576), (576, 1536)],
    "Llama-3.2-1B": [(3072, 2048), (2048, 2048), (16384, 2048), (2048, 8192)],
    "Llama-3-8B": [(6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336)],
}
# Rotated inputs, (inputs, outputs of down_proj), of every model size the method names.
ROTATIONS = [(1536, 576), (4864, 896), (8192, 2048), (11008, 4096), (14336, 4096), (18944, 3584)]
SCHEMES = {"w4a8": (4, 8, -1), "w4a4": (4, 4, -1), "w4a8_g128": (4, 8, 128), "w8a8": (8, 8, -1)}
COLD_BYTES = 96 << 20
CLIP = 0.9
Layer = Callable[[torch.Tensor], torch.Tensor]


class Rotating:
    """Calls a layer with one weight after the other, round and round."""

    def __init__(self, layer: Callable[[torch.Tensor, Any], torch.Tensor], weights: Iterable[Any]) -> None:
        self.layer, self.weights = layer, itertools.cycle(list(weights))

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """The layer's output with the next weight."""
        return self.layer(x, next(self.weights))


def ours(columns: int, inputs: int, scheme: str, copies: int) -> Layer:
    """``ops.linear`` of a scheme on random codes, over ``copies`` weights."""
    weight_bits, act_bits, group = SCHEMES[scheme]
    scale = torch.rand(columns, 1 if group == -1 or inputs % group else inputs // group)
    if weight_bits == 4:
        weight = torch.randint(0, 256, (columns, inputs // 2), dtype=torch.uint8)
    else:
        weight = torch.randint(-128, 128, (columns, inputs), dtype=torch.int8)
    return Rotating(
        lambda x, packed: ops.linear(x, packed, scale, None, 0, CLIP, act_bits, weight_bits),
        [ops.prepack_weight(weight, scale, weight_bits) for _ in range(copies)],
    )


def torch_bf16(columns: int, inputs: int, copies: int) -> Layer:
    """``torch.nn.functional.linear`` in bfloat16."""
    weight = torch.randn(columns, inputs, dtype=torch.bfloat16)
    return Rotating(torch.nn.functional.linear, [weight.clone() for _ in range(copies)])


def vllm_on_cpu() -> bool:
    """Load vLLM's CPU kernels; False where vLLM is missing or runs on something else."""
    try:
        from vllm.platforms import current_platform
    except ImportError:
        return False
    if not current_platform.is_cpu():
        return False
    current_platform.import_kernels()
    return True


def vllm_w8a8() -> Callable[[int, int, int], Layer] | None:
    """Maker of vLLM's CPU int8 linear (dynamic per-token quantisation, then oneDNN), or None where it is missing."""
    if not vllm_on_cpu() or not hasattr(torch.ops._C, "onednn_scaled_mm"):
        return None
    from vllm import _custom_ops as vllm_ops

    def linear(x: torch.Tensor, handler: Any) -> torch.Tensor:
        codes, scale, _ = vllm_ops.onednn_scaled_int8_quant(x, None, None, True)
        out = torch.empty((x.shape[0], handler.n), dtype=x.dtype)
        return vllm_ops.onednn_scaled_mm(handler, codes, out, scale, None, None, None)

    def make(columns: int, inputs: int, copies: int) -> Layer:
        weight = torch.randint(-128, 128, (columns, inputs), dtype=torch.int8)
        scale = torch.rand(columns, 1)
        create = vllm_ops.create_onednn_scaled_mm
        return Rotating(linear, [create(weight.t(), scale, torch.bfloat16, True, False, 32) for _ in range(copies)])

    return make


def floor_seconds(tokens: int, columns: int, inputs: int, weight_bits: int, floors: Floors) -> float:
    """The longer of reading the weights once from DRAM and multiplying at the peak rate."""
    read = columns * inputs * weight_bits / 8 / floors.read_bytes
    multiply = tokens * columns * inputs / floors.multiply_adds if floors.multiply_adds else 0.0
    return max(read, multiply)


def microseconds(timing: Timing | None) -> float | None:
    """Median in microseconds, or None for a contender that did not run."""
    return None if timing is None else round(timing.median * 1e6, 2)


def bench_linear(args: argparse.Namespace, floors: Floors) -> list[dict[str, Any]]:
    """One result per model, shape, number of tokens and scheme."""
    peer = vllm_w8a8()
    results = []
    for model, (columns, inputs) in ((name, shape) for name in args.models for shape in MODELS[name]):
        copies = -(-COLD_BYTES // (columns * inputs // 2))
        layers = {scheme: ours(columns, inputs, scheme, copies) for scheme in args.schemes}
        layers["bf16"] = torch_bf16(columns, inputs, max(2, copies // 4))
        if peer is not None:
            layers["vllm_w8a8"] = peer(columns, inputs, max(2, copies // 2))
        for tokens in args.tokens:
            x = torch.randn(tokens, inputs, dtype=torch.bfloat16)
            calls = {name: partial(layer, x) for name, layer in layers.items()}
            times = time_alternately(calls, args.rounds, args.seconds, CLOCKS[args.clock])
            for scheme in args.schemes:
                floor = floor_seconds(tokens, columns, inputs, SCHEMES[scheme][0], floors)
                results.append(
                    {
                        "op": f"linear_{scheme}",
                        "model": model,
                        "shape": [columns, inputs],
                        "M": tokens,
                        "ours_us": microseconds(times[scheme]),
                        "ours_best_us": round(times[scheme].best * 1e6, 2),
                        "floor_us": round(floor * 1e6, 2),
                        "bf16_us": microseconds(times["bf16"]),
                        "w8a8_us": microseconds(times.get("vllm_w8a8")),
                    }
                )
    return results


def bench_rotation(args: argparse.Namespace) -> list[dict[str, Any]]:
    """hadamard_quant for each listed size beside the down_proj that it feeds."""
    results = []
    for inputs, columns in ROTATIONS:
        down_proj = ours(columns, inputs, "w4a8", -(-COLD_BYTES // (columns * inputs // 2)))
        for tokens in args.tokens:
            x = torch.randn(tokens, inputs, dtype=torch.bfloat16)
            calls: dict[str, Callable[[], object]] = {"rotate": partial(ops.hadamard_quant, x, inputs, CLIP, 8)}
            calls["down_proj"] = partial(down_proj, x)
            times = time_alternately(calls, args.rounds, args.seconds, CLOCKS[args.clock])
            results.append(
                {
                    "op": "hadamard_quant",
                    "shape": [columns, inputs],
                    "M": tokens,
                    "ours_us": microseconds(times["rotate"]),
                    "ours_best_us": round(times["rotate"].best * 1e6, 2),
                    "down_proj_us": microseconds(times["down_proj"]),
                }
            )
    return results


def bench_producers(args: argparse.Namespace) -> list[dict[str, Any]]:
    """The ops that quantise what another op would have written first, beside that op followed by the plain quantisation."""
    norm = getattr(torch.ops._C, "fused_add_rms_norm", None) if vllm_on_cpu() else None
    results = []
    for inputs, tokens in itertools.product(sorted({inputs for inputs, _ in ROTATIONS}), args.tokens):
        gate_up = torch.randn(tokens, 2 * inputs, dtype=torch.bfloat16)

        def silu_mul_then_quant(x: torch.Tensor = gate_up, block: int = inputs) -> None:
            # As vLLM's SiluAndMul computes it on a CPU, outside a compiled graph.
            gate, up = x.chunk(2, dim=-1)
            ops.hadamard_quant(torch.nn.functional.silu(gate) * up, block, CLIP, 8)

        ours = partial(ops.silu_mul_hadamard_quant, gate_up, inputs, CLIP, 8)
        results.append(producer("silu_mul_hadamard_quant", inputs, tokens, ours, silu_mul_then_quant, args))
    if norm is None:
        return results
    for inputs, tokens in itertools.product(sorted({shapes[0][1] for shapes in MODELS.values()}), args.tokens):
        weight = torch.ones(inputs, dtype=torch.bfloat16)
        # Of zeros, so that no round of additions overflows.
        x, residual = (torch.zeros(tokens, inputs, dtype=torch.bfloat16) for _ in range(2))

        def norm_then_quant(x: torch.Tensor = x, residual: torch.Tensor = residual, weight: torch.Tensor = weight) -> None:
            norm(x, residual, weight, 1e-6)
            ops.quant(x, CLIP, 8)

        ours = partial(ops.rms_norm_quant, x, weight, 1e-6, CLIP, 8, residual)
        results.append(producer("rms_norm_quant", inputs, tokens, ours, norm_then_quant, args))
    return results


def producer(
    op: str, inputs: int, tokens: int, ours: Callable[[], object], separate: Callable[[], object], args: argparse.Namespace
) -> dict[str, Any]:
    """One result of :func:`bench_producers`."""
    times = time_alternately({"ours": ours, "separate": separate}, args.rounds, args.seconds, CLOCKS[args.clock])
    medians = {f"{name}_us": microseconds(timing) for name, timing in times.items()}
    return {"op": op, "inputs": inputs, "M": tokens, **medians, "ours_best_us": round(times["ours"].best * 1e6, 2)}


def show(report: dict[str, Any], console: Console) -> None:
    """The report as two tables."""
    linear = Table("op", "model", "N x K", "M", "ours µs", "of floor", "bf16 / ours", "W8A8 / ours", title="Linear layers")
    rotation = Table("K", "M", "hadamard_quant µs", "share of down_proj", title="Rotation")
    producers = Table("op", "K", "M", "ours µs", "separate / ours", title="Fused producers")
    for r in report["results"]:
        if "separate_us" in r:
            ratio = f"{r['separate_us'] / r['ours_us']:.2f}"
            producers.add_row(r["op"], str(r["inputs"]), str(r["M"]), f"{r['ours_us']:.1f}", ratio)
            continue
        columns, inputs = r["shape"]
        if r["op"] == "hadamard_quant":
            rotation.add_row(str(inputs), str(r["M"]), f"{r['ours_us']:.1f}", f"{r['ours_us'] / r['down_proj_us']:.1%}")
            continue
        ratio = "-" if r["w8a8_us"] is None else f"{r['w8a8_us'] / r['ours_us']:.2f}"
        linear.add_row(
            r["op"],
            r["model"],
            f"{columns} x {inputs}",
            str(r["M"]),
            f"{r['ours_us']:.1f}",
            f"{r['floor_us'] / r['ours_us']:.0%}",
            f"{r['bf16_us'] / r['ours_us']:.2f}",
            ratio,
        )
    floors = report["floors"]
    console.print(report["machine"], report["packages"], floors, sep="\n")
    console.print(linear, rotation, producers, sep="\n")


def main() -> None:
    """Parse the options, run, and print a table or JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=["cpu"], default="cpu")
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--schemes", nargs="+", choices=list(SCHEMES), default=["w4a8", "w4a8_g128"])
    parser.add_argument("--tokens", nargs="+", type=int, default=[1, 16, 128, 512])
    parser.add_argument("--rounds", type=int, default=7, help="measurements of each contender")
    parser.add_argument("--seconds", type=float, default=0.02, help="least length of one measurement")
    parser.add_argument(
        "--clock",
        choices=list(CLOCKS),
        default="wall",
        help="cpu runs one thread and counts only its own time: for a machine that others load",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    parser.add_argument("--output", type=Path, help="also write the JSON object to this file")
    args = parser.parse_args()
    if args.clock == "cpu":
        torch.set_num_threads(1)
    floors = measure_floors(torch.get_num_threads(), CLOCKS[args.clock])
    report = {
        "machine": machine() | {"kernel": ops.kernel_name(), "clock": args.clock},
        "packages": packages(),
        "floors": {"read_bytes_per_s": floors.read_bytes, "multiply_adds_per_s": floors.multiply_adds},
        "results": bench_linear(args, floors) + bench_rotation(args) + bench_producers(args),
    }
    text = json.dumps(report, indent=1)
    if args.output:
        args.output.write_text(text + "\n")
    if args.json:
        sys.stdout.write(text + "\n")
    else:
        show(report, Console(width=None if sys.stdout.isatty() else 120))


if __name__ == "__main__":
    main()
