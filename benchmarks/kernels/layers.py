# SPDX-License-Identifier: Apache-2.0
"""Op-level speed: our linear layers beside 16-bit ones, beside what vLLM has, and beside what the
device can do.

Contenders run alternately in one process on the same shapes. Weights are rotated through more
copies than the last-level cache holds, because a served model never finds a layer's weights in
cache.

    python -m benchmarks.kernels.layers --rounds 9
    python -m benchmarks.kernels.layers --device cuda
"""

import argparse
import sys
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from benchmarks.kernels.contenders import (
    Calls,
    Device,
    FloorSeconds,
    Rotating,
    floor_seconds,
    microseconds,
    ours,
)
from benchmarks.kernels.experts import bench_experts
from benchmarks.kernels.producers import bench_producers
from benchmarks.kernels.schemes import PER_CHANNEL, every_scheme, written_by
from benchmarks.support.machine import packages
from benchmarks.support.report import RESULTS, Schedule, save, show_facts, show_table, terminal
from benchmarks.support.timing import Floors, Timing
from smoothrot_vllm import ops
from smoothrot_vllm.hadamard import choose_block

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
TIMED_PRESETS = (PER_CHANNEL, "balanced", "best")
"""Whose schemes are timed unless told otherwise."""
# Unless the command line says otherwise.
CPU_DEFAULTS: dict[str, Any] = {
    "models": ["SmolLM2-135M", "Llama-3.2-1B", "Llama-3-8B"],
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


def of_floor(timing: Timing, floor: FloorSeconds) -> dict[str, float]:
    """Our columns of a row: times and floors in microseconds, and the share of the floor in the
    median."""
    return {
        "ours_us": microseconds(timing.median),
        "ours_best_us": microseconds(timing.best),
        "bytes_floor_us": round(floor.moving * 1e6, 3),
        "compute_floor_us": round(floor.multiplying * 1e6, 3),
        "floor_us": round(floor.longer * 1e6, 3),
        "share_of_floor": round(floor.longer / timing.median, 4),
    }


def of_peer(name: str, timing: Timing | None, our: Timing) -> dict[str, float | None]:
    """A peer's columns of a row, the last of them how many times as fast ours is: a ratio of
    medians."""
    if timing is None:
        return {f"{name}_us": None}
    return {
        f"{name}_us": microseconds(timing.median),
        f"{name}_best_us": microseconds(timing.best),
        f"{name}_ratio": round(timing.median / our.median, 3),
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
    cases = [(name, *shape) for name in args.models for shape in MODELS[name]]
    for model, columns, inputs in cases:
        waiting = [
            m for m in tokens_of_wave if schedule.allows(f"linear {columns} x {inputs}, {m} tokens")
        ]
        if not waiting:
            continue
        layers = build_ours(args, device, columns, inputs, failed)
        schemes = list(layers)
        packed = {scheme: [weight[0] for weight in layers[scheme].listed] for scheme in schemes}
        readers = {scheme: read for scheme in schemes if (read := device.reader(packed[scheme]))}
        # A peer may be called what one of our schemes is.
        layers = {f"our {scheme}": layer for scheme, layer in layers.items()}
        layers |= device.peers.build(columns, inputs, device.cache_bytes)
        for tokens in waiting:
            if not schedule.allows(f"linear {columns} x {inputs}, {tokens} tokens"):
                continue
            x = torch.randn(tokens, inputs, dtype=torch.bfloat16)
            ours_first = [f"our {scheme}" for scheme in schemes]
            running = [*ours_first, *sorted(device.peers.call_once(layers, x))]
            chosen = {name: layers[name] for name in running}
            calls: Calls = {
                name: (partial(layer, layer.prepare(x)), layer.copies)
                for name, layer in chosen.items()
            }
            calls |= {f"{scheme} read": (read, 1) for scheme, read in readers.items()}
            times = device.time(calls, args.rounds, args.seconds)
            for scheme in schemes:
                found = floors
                if scheme in readers:
                    memory = sum(weight.nbytes for weight in packed[scheme])
                    found = replace(floors, read_bytes=memory / times[f"{scheme} read"].median)
                floor = floor_seconds(
                    tokens, columns, inputs, every_scheme()[scheme], found, device.activation_bytes
                )
                row: dict[str, Any] = {
                    "op": f"linear_{scheme}",
                    "model": model,
                    "shape": [columns, inputs],
                    "M": tokens,
                    **of_floor(times[f"our {scheme}"], floor),
                    "read_gb_per_s": round(found.read_bytes / 1e9, 1),
                }
                for peer in device.peers.makers:
                    row |= of_peer(peer, times.get(peer), times[f"our {scheme}"])
                yield row


def bench_activations(
    args: argparse.Namespace,
    device: Device,
    floors: Floors,
    schedule: Schedule,
    tokens_of_wave: list[int],
) -> Iterator[dict[str, Any]]:
    """Per size of down_proj: quantizing its input plain and rotated, and the layer it feeds
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
                calls: Calls = {
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
                        "down_proj_us": microseconds(times["down_proj"].median),
                        "rotated_down_proj_us": microseconds(times["rotated"].median),
                    }


def show(report: dict[str, Any], console: Console) -> None:
    """The report as tables and what is not in them."""

    def rows(*ops: str) -> list[dict[str, Any]]:
        return [row for row in report["results"] if row["op"].startswith(ops)]

    of_all = {
        "op": lambda r: r["op"],
        "M": lambda r: r["M"],
        "ours µs": lambda r: f"{r['ours_us']:.1f}",
        "of floor": lambda r: f"{r['floor_us'] / r['ours_us']:.0%}",
    }
    of_model = {"model": lambda r: r["model"]} | of_all
    of_shape = {"N x K": lambda r: " x ".join(map(str, r["shape"]))}
    peers = {
        f"{peer} / ours": lambda r, peer=peer: f"{r[f'{peer}_ratio']:.2f}"
        for peer in report["peers"]
    }
    activations = {
        "bits": lambda r: r["act_bits"],
        "share of down_proj": lambda r: f"{r['ours_us'] / r['down_proj_us']:.1%}",
        "down_proj µs": lambda r: f"{r['down_proj_us']:.1f}",
        "with rotation µs": lambda r: f"{r['rotated_down_proj_us']:.1f}",
    }
    separate = {
        "K": lambda r: r["inputs"],
        "separate / ours": lambda r: f"{r['separate_us'] / r['ours_us']:.2f}",
    }
    bf16 = {"bf16 / ours": lambda r: f"{r['bf16_us'] / r['ours_us']:.2f}"}
    show_table(console, "Linear layers", of_model | of_shape | peers, rows("linear"))
    show_table(console, "Activations", of_all | of_shape | activations, rows("quant", "hadamard"))
    show_table(console, "Fused producers", of_all | separate, rows("silu_mul", "rms_norm"))
    show_table(console, "Experts of a layer", of_model | bf16, rows("experts"))
    show_facts(report, console)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line, with the device's defaults filled in."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
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
        "--json",
        type=Path,
        help="of the report; cuda: results/GPU/kernels.json unless told otherwise",
    )
    args = parser.parse_args(arguments)
    if args.dry_run and args.device != "cuda":
        parser.error("--dry-run: expected --device cuda, of which it is the rehearsal")
    args.rotations = args.mixtures = None
    of_cuda = REHEARSAL_DEFAULTS if args.dry_run else CUDA_DEFAULTS
    defaults = CPU_DEFAULTS if args.device == "cpu" else of_cuda
    for name, value in defaults.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if args.schemes is None:
        args.schemes = [
            name
            for name, scheme in written_by(TIMED_PRESETS).items()
            # On a CPU 4-bit activations are multiplied as 8-bit ones are.
            if args.device == "cuda" or scheme.activations.bits == 8
        ]
    return args


def open_device(args: argparse.Namespace) -> Device:
    """The device that the command line names, made torch's default; exits with 2 and the reason
    where it cannot be used."""
    if args.device == "cpu":
        from benchmarks.kernels.cpu import CpuDevice

        return CpuDevice()
    from benchmarks.kernels.cuda import open_cuda

    return open_cuda("layers.py --device cuda", args.dry_run)


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
        "missing": device.peers.missing,
        "left_out": schedule.left_out,
        "failed": failed,
        "results": results,
    }


def main() -> int:
    """Parse the options, run, and print tables; 1 if anything of ours failed."""
    args = parse()
    device = open_device(args)
    report = run(args, device)
    on_gpu = args.device == "cuda" and not args.dry_run
    save(report, args.json or (RESULTS / device.name / "kernels.json" if on_gpu else None))
    show(report, terminal())
    return 1 if report["failed"] else 0


if __name__ == "__main__":
    sys.exit(main())
