# SPDX-License-Identifier: Apache-2.0
"""Op-level speed: our linear layers beside 16-bit ones, beside what vLLM has, and beside what the
device can do.

Contenders run alternately in one process on the same shapes. Weights are rotated through more
copies than the last-level cache holds, because a served model never finds a layer's weights in
cache.
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
from contenders import Device, FloorSeconds, Rotating, floor_seconds, ours
from expert_layers import bench_experts
from producers import bench_producers
from rich.box import MARKDOWN
from rich.console import Console
from rich.table import Table
from schemes import PER_CHANNEL, every_scheme, written_by

from smoothrot_vllm import ops
from smoothrot_vllm.hadamard import choose_block

Shape = tuple[int, int]
# Linears of a decoder layer as (outputs, inputs), fused as vLLM fuses them; the last is down_proj,
# which is rotated.
MODELS = {
    "SmolLM2-135M": [(960, 576), (576, 576), (3072, 576), (576, 1536)],
    "Llama-3.2-1B": [(3072, 2048), (2048, 2048), (16384, 2048), (2048, 8192)],
    "Llama-3-8B": [(6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336)],
    "rehearsal": [(192, 128), (128, 128), (512, 128), (128, 256)],
}
# (outputs, inputs) of down_proj of every model size the method names.
ROTATIONS = [(576, 1536), (896, 4864), (2048, 8192), (4096, 11008), (4096, 14336), (3584, 18944)]
WORTH = (1, 16, 256, 4096)
"""Numbers of tokens that are timed before any other: a request alone, a batch, the edge of the
compute bound, a long prompt."""
GPU_PRESETS = (PER_CHANNEL, "balanced", "best")
"""Whose schemes a GPU's run times."""
# Unless the command line says otherwise.
CPU_DEFAULTS: dict[str, Any] = {
    "models": ["SmolLM2-135M", "Llama-3.2-1B", "Llama-3-8B"],
    "schemes": ["w4a8", "w4a8_g128"],
    "tokens": [1, 16, 128, 512],
    "rotations": ROTATIONS,
    "mixtures": ["Qwen3-30B-A3B, half of its experts"],
    "minutes": None,
    "rounds": 7,
    "seconds": 0.02,
}
CUDA_DEFAULTS: dict[str, Any] = {
    "models": ["Llama-3-8B"],
    "tokens": [1, 4, 16, 64, 256, 1024, 4096],
    "rotations": [(4096, 14336)],
    "mixtures": ["Qwen3-30B-A3B, half of its experts"],
    "minutes": 2.0,
    "rounds": 5,
    "seconds": 0.01,
}
REHEARSAL_DEFAULTS = CUDA_DEFAULTS | {
    "models": ["rehearsal"],
    "rotations": [(128, 256)],
    "mixtures": ["rehearsal"],
    "rounds": 1,
    "seconds": 1e-4,
}


def microseconds(timing: Timing | None) -> float | None:
    """Median in microseconds, or None for a contender that did not run."""
    return None if timing is None else round(timing.median * 1e6, 2)


def of_floor(timing: Timing, floor: FloorSeconds) -> dict[str, float]:
    """Our columns of a row: times and floors in microseconds, and the share of the floor in the
    median."""
    return {
        "ours_us": round(timing.median * 1e6, 2),
        "ours_best_us": round(timing.best * 1e6, 2),
        "bytes_floor_us": round(floor.moving * 1e6, 3),
        "compute_floor_us": round(floor.multiplying * 1e6, 3),
        "floor_us": round(floor.longer * 1e6, 3),
        "share_of_floor": round(floor.longer / timing.median, 4),
    }


def build_ours(
    args: argparse.Namespace, device: Device, columns: int, inputs: int, failed: dict[str, str]
) -> dict[str, Rotating]:
    """Our layer of one shape in each scheme, called once; one that cannot be called is put into
    ``failed``."""
    built = {}
    for scheme in args.schemes:
        try:
            layer = ours(columns, inputs, every_scheme()[scheme], device.cache_bytes)
            layer(torch.randn(1, inputs, dtype=torch.bfloat16))
            built[scheme] = layer
        except Exception as error:
            failed[f"{scheme}, {columns} x {inputs}"] = f"{type(error).__name__}: {error}"
    return built


def bench_linear(
    args: argparse.Namespace,
    device: Device,
    floors: Floors,
    schedule: Schedule,
    failed: dict[str, str],
    tokens_of_wave: list[int],
) -> Iterator[dict[str, Any]]:
    """One result per model, shape, number of tokens and scheme, without the rotation of down_proj.

    The floor's bandwidth is found by reading the same weights in turn with the contenders, where
    the device has a reader.
    """
    for model, (columns, inputs) in (
        (name, shape) for name in args.models for shape in MODELS[name]
    ):
        waiting = [
            m for m in tokens_of_wave if schedule.allows(f"linear {columns} x {inputs}, {m} tokens")
        ]
        if not waiting:
            continue
        layers = build_ours(args, device, columns, inputs, failed)
        schemes = list(layers)
        packed = {scheme: [weight[0] for weight in layers[scheme].listed] for scheme in schemes}
        readers = {scheme: read for scheme in schemes if (read := device.reader(packed[scheme]))}
        layers |= device.peers.build(columns, inputs, device.cache_bytes)
        for tokens in waiting:
            if not schedule.allows(f"linear {columns} x {inputs}, {tokens} tokens"):
                continue
            x = torch.randn(tokens, inputs, dtype=torch.bfloat16)
            running = [*schemes, *sorted(device.peers.call_once(layers, x))]
            chosen = {name: layers[name] for name in running}
            calls = {
                name: (partial(layer, layer.prepare(x)), layer.copies)
                for name, layer in chosen.items()
            }
            calls |= {f"{scheme} read": (read, 1) for scheme, read in readers.items()}
            times = device.time(calls, args.rounds, args.seconds)
            peers = {peer: times.get(peer) for peer in device.peers.makers}
            for scheme in schemes:
                found = floors
                if scheme in readers:
                    memory = sum(weight.nbytes for weight in packed[scheme])
                    found = replace(floors, read_bytes=memory / times[f"{scheme} read"].median)
                floor = floor_seconds(
                    tokens, columns, inputs, every_scheme()[scheme], found, device.activation_bytes
                )
                yield {
                    "op": f"linear_{scheme}",
                    "model": model,
                    "shape": [columns, inputs],
                    "M": tokens,
                    **of_floor(times[scheme], floor),
                    "read_gb_per_s": round(found.read_bytes / 1e9, 1),
                    **{f"{peer}_us": microseconds(timing) for peer, timing in peers.items()},
                    **{
                        f"{peer}_best_us": round(timing.best * 1e6, 2)
                        for peer, timing in peers.items()
                        if timing
                    },
                    **{
                        f"{peer}_ratio": round(t.median / times[scheme].median, 3)
                        for peer, t in peers.items()
                        if t
                    },
                }


def bench_activations(
    args: argparse.Namespace,
    device: Device,
    floors: Floors,
    schedule: Schedule,
    tokens_of_wave: list[int],
) -> Iterator[dict[str, Any]]:
    """Per size of down_proj: quantising its input plain and rotated, and the layer it feeds
    without and with the rotation."""
    by_bits = {every_scheme()[scheme].activations.bits: scheme for scheme in reversed(args.schemes)}
    for columns, inputs in args.rotations:
        block = choose_block(inputs).size
        for act_bits, scheme in by_bits.items():
            clip = every_scheme()[scheme].activations.clip
            down_proj = ours(columns, inputs, every_scheme()[scheme], device.cache_bytes)
            rotated = ours(columns, inputs, every_scheme()[scheme], device.cache_bytes, block)
            for tokens in tokens_of_wave:
                if not schedule.allows(
                    f"hadamard_quant of {inputs} to {act_bits} bits, {tokens} tokens"
                ):
                    continue
                x = torch.randn(tokens, inputs, dtype=torch.bfloat16)
                calls = {
                    "quant": (partial(ops.quant, x, clip, act_bits), 1),
                    "hadamard_quant": (partial(ops.hadamard_quant, x, block, clip, act_bits), 1),
                    "down_proj": (partial(down_proj, x), down_proj.copies),
                    "rotated": (partial(rotated, x), rotated.copies),
                }
                times = device.time(calls, args.rounds, args.seconds)
                moved = tokens * (inputs * (device.activation_bytes + act_bits / 8) + 4)
                floor = FloorSeconds(moved / floors.read_bytes, 0.0)
                for op in ("quant", "hadamard_quant"):
                    yield {
                        "op": op,
                        "act_bits": act_bits,
                        "shape": [columns, inputs],
                        "M": tokens,
                        **of_floor(times[op], floor),
                        "scheme": scheme,
                        "down_proj_us": microseconds(times["down_proj"]),
                        "rotated_down_proj_us": microseconds(times["rotated"]),
                    }


def show(report: dict[str, Any], console: Console) -> None:
    """The report as tables and what is not in them."""
    peers = report["peers"]
    ratios = [f"{peer} / ours" for peer in peers]
    table = partial(Table, box=MARKDOWN, title_justify="left")
    linear = table(
        "op",
        "model",
        "N x K",
        "M",
        "ours µs",
        "floor µs",
        "of floor",
        *ratios,
        title="Linear layers",
    )
    activations = table(
        "op",
        "bits",
        "K",
        "M",
        "µs",
        "of floor",
        "share of down_proj",
        "down_proj µs",
        "with rotation µs",
        title="Activations",
    )
    experts = table(
        "model", "M", "ours µs", "of floor", "bf16 / ours", title="Experts of a layer, W4A8"
    )
    producers = table("op", "K", "M", "ours µs", "separate / ours", title="Fused producers")
    for r in report["results"]:
        if "separate_us" in r:
            ratio = f"{r['separate_us'] / r['ours_us']:.2f}"
            producers.add_row(r["op"], str(r["inputs"]), str(r["M"]), f"{r['ours_us']:.1f}", ratio)
            continue
        if r["op"].startswith("experts"):
            ratio = "-" if r["bf16_us"] is None else f"{r['bf16_us'] / r['ours_us']:.2f}"
            experts.add_row(
                r["model"],
                str(r["M"]),
                f"{r['ours_us']:.1f}",
                f"{r['floor_us'] / r['ours_us']:.0%}",
                ratio,
            )
            continue
        columns, inputs = r["shape"]
        share = f"{r['share_of_floor']:.0%}"
        if r["op"] in ("quant", "hadamard_quant"):
            cells = [
                r["op"],
                str(r["act_bits"]),
                str(inputs),
                str(r["M"]),
                f"{r['ours_us']:.1f}",
                share,
            ]
            layers = f"{r['down_proj_us']:.1f}", f"{r['rotated_down_proj_us']:.1f}"
            activations.add_row(*cells, f"{r['ours_us'] / r['down_proj_us']:.1%}", *layers)
            continue
        linear.add_row(
            r["op"],
            r["model"],
            f"{columns} x {inputs}",
            str(r["M"]),
            f"{r['ours_us']:.1f}",
            f"{r['floor_us']:.1f}",
            share,
            *(f"{r[f'{peer}_ratio']:.2f}" if f"{peer}_ratio" in r else "-" for peer in peers),
        )
    console.print(report["machine"], report["packages"], report["floors"], sep="\n")
    console.print(linear, activations, producers, experts, sep="\n")
    for peer, reason in report["missing_peers"].items():
        console.print(f"not measured: {peer}: {reason}", markup=False)
    for case in report["left_out"]:
        console.print(f"left out, time was up: {case}", markup=False)
    for section, reason in report["failed"].items():
        console.print(f"FAILED: {section}: {reason}", markup=False)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line, with the device's defaults filled in."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="of --device cuda: its code on the CPU, in tiny shapes",
    )
    parser.add_argument("--models", nargs="+", choices=list(MODELS))
    parser.add_argument("--schemes", nargs="+", choices=list(every_scheme()))
    parser.add_argument("--tokens", nargs="+", type=int)
    parser.add_argument("--rounds", type=int, help="measurements of each contender")
    parser.add_argument("--seconds", type=float, help="least length of one measurement")
    parser.add_argument(
        "--minutes", type=float, help="begin no case after this long; cpu: no limit, cuda: 2"
    )
    parser.add_argument(
        "--clock",
        choices=list(CLOCKS),
        default="wall",
        help=(
            "of the CPU; cpu runs one thread and counts only its own time: for a machine that"
            " others load"
        ),
    )
    parser.add_argument(
        "--json",
        nargs="?",
        const="-",
        metavar="FILE",
        help=(
            "write the report there as one JSON object; without FILE print it and nothing else. A"
            " GPU's run always writes one, to results/GPU/kernels.json unless told otherwise"
        ),
    )
    args = parser.parse_args(arguments)
    if args.dry_run and args.device != "cuda":
        parser.error("--dry-run: expected --device cuda, of which it is the rehearsal")
    args.rotations = args.mixtures = None
    defaults = (
        CPU_DEFAULTS
        if args.device == "cpu"
        else REHEARSAL_DEFAULTS
        if args.dry_run
        else CUDA_DEFAULTS
    )
    for name, value in defaults.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if args.schemes is None:
        args.schemes = list(written_by(GPU_PRESETS))
    return args


def open_device(args: argparse.Namespace) -> Device:
    """The device that the command line names, made torch's default; exits with 2 and the reason
    where it cannot be used."""
    if args.device == "cpu":
        from device_cpu import CpuDevice

        if args.clock == "cpu":
            torch.set_num_threads(1)
        return CpuDevice(args.clock)
    from device_cuda import open_cuda, open_rehearsal

    return open_rehearsal() if args.dry_run else open_cuda("kernels.py --device cuda")


def run(args: argparse.Namespace, device: Device) -> dict[str, Any]:
    """The report, as it is written; a scheme or section that fails is named in it with what it
    said, and the others go on."""
    schedule = Schedule(args.minutes)
    floors = device.floors()
    waves = [[m for m in args.tokens if m in WORTH], [m for m in args.tokens if m not in WORTH]]
    widths = (
        sorted({inputs for _, inputs in args.rotations}),
        sorted({MODELS[name][0][1] for name in args.models}),
    )
    failed: dict[str, str] = {}
    sections = {}
    for number, wave in enumerate(waves, 1):
        sections[f"linear layers, wave {number}"] = bench_linear(
            args, device, floors, schedule, failed, wave
        )
        sections[f"activations, wave {number}"] = bench_activations(
            args, device, floors, schedule, wave
        )
    sections["producers"] = bench_producers(args, device, schedule, *widths)
    sections["experts"] = bench_experts(args, device, floors, schedule)
    results: list[dict[str, Any]] = []
    for name, rows in sections.items():
        try:
            results.extend(rows)
        except Exception as error:
            failed[name] = f"{type(error).__name__}: {error}"
    return {
        "machine": device.facts(),
        "packages": packages(),
        "floors": floors.record(),
        "cache_bytes": device.cache_bytes,
        "peers": list(device.peers.makers),
        "missing_peers": device.peers.missing,
        "left_out": schedule.left_out,
        "failed": failed,
        "results": results,
    }


def main() -> int:
    """Parse the options, run, and print a table or JSON; 1 if anything of ours failed."""
    args = parse()
    device = open_device(args)
    report = run(args, device)
    text = json.dumps(report, indent=1)
    is_gpu = args.device == "cuda" and not args.dry_run
    output = args.json or (str(RESULTS / device.name / "kernels.json") if is_gpu else None)
    if output == "-":
        sys.stdout.write(text + "\n")
        return 1 if report["failed"] else 0
    if output is not None:
        Path(output).parent.mkdir(parents=True, exist_ok=True)
        Path(output).write_text(text + "\n")
    show(report, Console(width=None if sys.stdout.isatty() else 300))
    return 1 if report["failed"] else 0


if __name__ == "__main__":
    sys.exit(main())
