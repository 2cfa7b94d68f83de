# SPDX-License-Identifier: Apache-2.0
"""Op-level speed: our linear layers beside 16-bit ones, beside what vLLM has, and beside what the device can do.

Contenders run alternately in one process on the same shapes. Weights are rotated through more copies than the
last-level cache holds, because a served model never finds a layer's weights in cache.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common import CLOCKS, RESULTS, Floors, Schedule, Timing, packages
from contenders import CLIP, SCHEMES, Device, floor_seconds, ours
from expert_layers import bench_experts
from producers import bench_producers
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
# Unless the command line says otherwise. The GPU's whole run, with all peers, is meant to take under three minutes.
DEFAULTS: dict[str, dict[str, Any]] = {
    "cpu": {"models": list(MODELS), "schemes": ["w4a8", "w4a8_g128"], "tokens": [1, 16, 128, 512], "minutes": None},
    "cuda": {
        "models": ["Llama-3-8B"],
        "schemes": ["w4a4", "w4a8"],
        "tokens": [1, 4, 16, 32, 128, 512, 2048, 4096],
        "minutes": 4.0,
    },
}


def microseconds(timing: Timing | None) -> float | None:
    """Median in microseconds, or None for a contender that did not run."""
    return None if timing is None else round(timing.median * 1e6, 2)


def copies_of(device: Device, columns: int, inputs: int) -> int:
    """How many 4-bit weights are more than the device's cache holds."""
    return -(-device.cache_bytes // (columns * inputs // 2))


def bench_linear(args: argparse.Namespace, device: Device, floors: Floors, schedule: Schedule) -> Iterator[dict[str, Any]]:
    """One result per model, shape, number of tokens and scheme.

    The floor's bandwidth is found by reading the same weights in turn with the contenders, where the device has a reader.
    """
    for model, (columns, inputs) in ((name, shape) for name in args.models for shape in MODELS[name]):
        copies = copies_of(device, columns, inputs)
        layers = {scheme: ours(columns, inputs, scheme, copies) for scheme in args.schemes}
        layers |= device.peers.build(columns, inputs, copies)
        readers = {scheme: read for scheme in args.schemes if (read := device.reader(layers[scheme].listed))}
        for tokens in args.tokens:
            if not schedule.allows(f"linear {columns} x {inputs}, {tokens} tokens"):
                continue
            x = torch.randn(tokens, inputs, dtype=torch.bfloat16)
            running = [*args.schemes, *sorted(device.peers.call_once(layers, x))]
            chosen = {name: layers[name] for name in running}
            calls = {name: (partial(layer, x.to(layer.dtype)), layer.copies) for name, layer in chosen.items()}
            calls |= {f"{scheme} read": (read, 1) for scheme, read in readers.items()}
            times = device.time(calls, args.rounds, args.seconds)
            for scheme in args.schemes:
                found = floors
                if scheme in readers:
                    memory = sum(weight.nbytes for weight in layers[scheme].listed)
                    found = replace(floors, read_bytes=memory / times[f"{scheme} read"].median)
                floor = floor_seconds(tokens, columns, inputs, scheme, found, device.activation_bytes)
                yield {
                    "op": f"linear_{scheme}",
                    "model": model,
                    "shape": [columns, inputs],
                    "M": tokens,
                    "ours_us": microseconds(times[scheme]),
                    "ours_best_us": round(times[scheme].best * 1e6, 2),
                    "floor_us": round(floor * 1e6, 2),
                    "read_gb_per_s": round(found.read_bytes / 1e9, 1),
                    **{f"{peer}_us": microseconds(times.get(peer)) for peer in device.peers.makers},
                }


def bench_rotation(args: argparse.Namespace, device: Device, schedule: Schedule) -> Iterator[dict[str, Any]]:
    """hadamard_quant for each listed size beside the down_proj that it feeds."""
    for inputs, columns in ROTATIONS:
        down_proj = ours(columns, inputs, "w4a8", copies_of(device, columns, inputs))
        for tokens in args.tokens:
            if not schedule.allows(f"hadamard_quant of {inputs}, {tokens} tokens"):
                continue
            x = torch.randn(tokens, inputs, dtype=torch.bfloat16)
            rotate = partial(ops.hadamard_quant, x, inputs, CLIP, 8)
            rotate()  # prepares the rotation, which allocates
            calls = {"rotate": (rotate, 1), "down_proj": (partial(down_proj, x), down_proj.copies)}
            times = device.time(calls, args.rounds, args.seconds)
            yield {
                "op": "hadamard_quant",
                "shape": [columns, inputs],
                "M": tokens,
                "ours_us": microseconds(times["rotate"]),
                "ours_best_us": round(times["rotate"].best * 1e6, 2),
                "down_proj_us": microseconds(times["down_proj"]),
            }


def show(report: dict[str, Any], console: Console) -> None:
    """The report as tables and what is not in them."""
    peers = report["peers"]
    ratios = [f"{peer} / ours" for peer in peers]
    linear = Table("op", "model", "N x K", "M", "ours µs", "of floor", *ratios, title="Linear layers")
    rotation = Table("K", "M", "hadamard_quant µs", "share of down_proj", title="Rotation")
    experts = Table("model", "M", "ours µs", "of floor", "bf16 / ours", title="Experts of a layer, W4A8")
    producers = Table("op", "K", "M", "ours µs", "separate / ours", title="Fused producers")
    for r in report["results"]:
        if "separate_us" in r:
            ratio = f"{r['separate_us'] / r['ours_us']:.2f}"
            producers.add_row(r["op"], str(r["inputs"]), str(r["M"]), f"{r['ours_us']:.1f}", ratio)
            continue
        if r["op"].startswith("experts"):
            ratio = "-" if r["bf16_us"] is None else f"{r['bf16_us'] / r['ours_us']:.2f}"
            experts.add_row(r["model"], str(r["M"]), f"{r['ours_us']:.1f}", f"{r['floor_us'] / r['ours_us']:.0%}", ratio)
            continue
        columns, inputs = r["shape"]
        if r["op"] == "hadamard_quant":
            rotation.add_row(str(inputs), str(r["M"]), f"{r['ours_us']:.1f}", f"{r['ours_us'] / r['down_proj_us']:.1%}")
            continue
        taken = [r[f"{peer}_us"] for peer in peers]
        linear.add_row(
            r["op"],
            r["model"],
            f"{columns} x {inputs}",
            str(r["M"]),
            f"{r['ours_us']:.1f}",
            f"{r['floor_us'] / r['ours_us']:.0%}",
            *("-" if other is None else f"{other / r['ours_us']:.2f}" for other in taken),
        )
    console.print(report["machine"], report["packages"], report["floors"], sep="\n")
    console.print(linear, rotation, producers, experts, sep="\n")
    for peer, reason in report["missing_peers"].items():
        console.print(f"not measured: {peer}: {reason}", markup=False)
    for case in report["left_out"]:
        console.print(f"left out, time was up: {case}", markup=False)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line, with the device's defaults filled in."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=list(DEFAULTS), default="cpu")
    parser.add_argument("--models", nargs="+", choices=list(MODELS))
    parser.add_argument("--schemes", nargs="+", choices=list(SCHEMES))
    parser.add_argument("--tokens", nargs="+", type=int)
    parser.add_argument("--rounds", type=int, default=7, help="measurements of each contender")
    parser.add_argument("--seconds", type=float, default=0.02, help="least length of one measurement")
    parser.add_argument("--minutes", type=float, help="begin no case after this long; cpu: no limit, cuda: 4")
    parser.add_argument(
        "--clock",
        choices=list(CLOCKS),
        default="wall",
        help="of the CPU; cpu runs one thread and counts only its own time: for a machine that others load",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    parser.add_argument("--output", type=Path, help="also write the JSON object to this file; cuda: results/GPU/kernels.json")
    args = parser.parse_args(arguments)
    for name, value in DEFAULTS[args.device].items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    return args


def open_device(args: argparse.Namespace) -> Device:
    """The device that the command line names, made torch's default; exits with 2 and the reason where it cannot be used."""
    if args.device == "cpu":
        from device_cpu import CpuDevice

        if args.clock == "cpu":
            torch.set_num_threads(1)
        return CpuDevice(args.clock)
    from gpu_ready import require

    require("kernels.py --device cuda")
    from device_cuda import CudaDevice

    torch.set_default_device("cuda")
    return CudaDevice()


def run(args: argparse.Namespace, device: Device) -> dict[str, Any]:
    """The report, as it is written."""
    schedule = Schedule(args.minutes)
    floors = device.floors()
    results = [*bench_linear(args, device, floors, schedule), *bench_rotation(args, device, schedule)]
    widths = sorted({inputs for inputs, _ in ROTATIONS}), sorted({shapes[0][1] for shapes in MODELS.values()})
    results += bench_producers(args, device, schedule, *widths)
    results += bench_experts(args, device, floors, schedule)
    return {
        "machine": device.facts(),
        "packages": packages(),
        "floors": floors.record(),
        "peers": list(device.peers.makers),
        "missing_peers": device.peers.missing,
        "left_out": schedule.left_out,
        "results": results,
    }


def main() -> None:
    """Parse the options, run, and print a table or JSON."""
    args = parse()
    device = open_device(args)
    report = run(args, device)
    text = json.dumps(report, indent=1)
    output = args.output or (RESULTS / device.name / "kernels.json" if args.device == "cuda" else None)
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(text + "\n")
    if args.json:
        sys.stdout.write(text + "\n")
    else:
        show(report, Console(width=None if sys.stdout.isatty() else 140))


if __name__ == "__main__":
    main()
