# SPDX-License-Identifier: Apache-2.0
"""Decode steps of whole models without vLLM: a plain torch Llama on random weights, one CUDA graph
a step.

    python benchmarks/decode.py --device cuda --minutes 1.5 --json decode.json

Contenders differ in their linears alone (decode_linears.py). Before ours are timed, their linears
and logits are held against
those of a bfloat16 model of the same dequantised weights: a wrong scale, rotation or order would
show there.
"""

import argparse
import json
import os
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, Schedule, packages, time_alternately
from convert import COMMON
from decode_linears import (
    CONTENDERS,
    OURS,
    Bf16Weight,
    Linears,
    OurWeight,
    StoredWeight,
    Weight,
    assemble,
    make,
    shapes,
    stored_weights,
)
from decode_model import Llama, Pieces, State
from device_cuda import CudaDevice, Rehearsal, open_cuda, open_rehearsal
from rich.box import MARKDOWN
from rich.console import Console
from rich.table import Table
from schemes import CONFIGS, preset_schema

from smoothrot_offline.source.family import ModelSpec
from smoothrot_offline.source.resolve import resolve

REHEARSAL = COMMON | {
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 512,
    "tie_word_embeddings": True,
}
MODELS = {**CONFIGS, "rehearsal": REHEARSAL}
LEAST_COSINES = {8: {"linears": 0.999, "logits": 0.99}, 4: {"linears": 0.96, "logits": 0.95}}
"""By bits of the activations: 4 of them cost an eighth of a linear's output. With another row's
scales a linear's is at 0.92."""
CHECKED_LAYERS, CHECKED_BATCH, CHECKED_CONTEXT = 2, 16, 64


def agreement(
    spec: ModelSpec, weights: list[StoredWeight], reference: list[torch.Tensor], pieces: Pieces
) -> dict[str, float]:
    """The least cosine, over the tokens of a batch, between ours and bfloat16: of any linear's
    output, and of the logits.

    Args:
        spec: sizes.
        weights: ours, in the order of ``decode_linears.assemble``.
        reference: what the bfloat16 model multiplies by.
        pieces: what lies between the linears.
    """
    models: list[list[Weight]] = [
        list(map(OurWeight, weights)),
        [Bf16Weight(values, pieces) for values in reference],
    ]
    kinds = len(shapes(spec))
    linears = []
    for index, pair in enumerate(zip(*models, strict=True)):
        is_down = index % kinds == kinds - 1
        inputs = torch.randn(
            CHECKED_BATCH, reference[index].shape[1] * (1 + is_down), dtype=torch.bfloat16
        )
        linears.append(
            _least_cosine(
                [w.silu_mul_linear(inputs) if is_down else w.linear(inputs) for w in pair]
            )
        )
    state = State.random(spec, CHECKED_BATCH, CHECKED_CONTEXT)
    assembled = [assemble(iter(model), spec) for model in models]
    logits = [Llama(spec, found.layers, found.head, state, pieces).logits() for found in assembled]
    return {"linears": min(linears), "logits": _least_cosine(logits)}


def _least_cosine(pair: list[torch.Tensor]) -> float:
    return round(
        float(torch.nn.functional.cosine_similarity(pair[0].float(), pair[1].float()).min()), 5
    )


def agrees(cosines: dict[str, float], act_bits: int) -> bool:
    """Whether an agreement is as close as the activations allow; one that is not a number is
    not."""
    return all(cosines[what] > least for what, least in LEAST_COSINES[act_bits].items())


def check(name: str, spec: ModelSpec, pieces: Pieces) -> dict[str, Any]:
    """Hold one of ours, two layers of it, against its dequantised weights."""
    preset, act_bits = OURS[name]
    spec = replace(spec, layers=CHECKED_LAYERS)
    weights = list(stored_weights(spec, preset_schema(spec, preset, act_bits)))
    found = agreement(spec, weights, [weight.dequantized() for weight in weights], pieces)
    return {"cosines": found, "least": LEAST_COSINES[act_bits], "passed": agrees(found, act_bits)}


def time_steps(
    args: argparse.Namespace,
    device: CudaDevice,
    spec: ModelSpec,
    linears: Linears,
    pieces: Pieces,
    batch: int,
    rate: float,
) -> dict[str, Any]:
    """Milliseconds of a step, its floor at ``rate`` bytes/s, and the most memory that the model
    took."""
    if not isinstance(device, Rehearsal):
        torch.cuda.reset_peak_memory_stats()
    state = State.random(spec, batch, args.context, linears.tied)
    model = Llama(spec, linears.layers, linears.head, state, pieces)
    model.step()  # compiles and prepares what a graph cannot
    graph = device.graph(model.step, 1)
    timing = time_alternately({"step": graph}, args.rounds, args.seconds, device.new_clock())[
        "step"
    ]
    floor = (linears.weight_bytes + state.cache_bytes) / rate
    return {
        "batch": batch,
        "context": args.context,
        "ms_per_step": round(timing.median * 1e3, 4),
        "best_ms_per_step": round(timing.best * 1e3, 4),
        "tokens_per_s": round(batch / timing.median, 1),
        "weight_bytes": linears.weight_bytes,
        "cache_bytes": state.cache_bytes,
        "weight_floor_ms": round(linears.weight_bytes / rate * 1e3, 4),
        "floor_ms": round(floor * 1e3, 4),
        "share_of_floor": round(floor / timing.median, 4),
        "peak_memory_bytes": torch.cuda.max_memory_allocated() if state.tokens.is_cuda else None,
    }


def bench(
    args: argparse.Namespace,
    device: CudaDevice,
    pieces: Pieces,
    schedule: Schedule,
    report: dict[str, Any],
    rate: float,
) -> Iterator[dict[str, Any]]:
    """One row per model, contender and batch; what fails is put into ``report``: ours as failed,
    peers as missing."""
    for model in args.models:
        torch.compiler.reset()  # it compiles a function for eight sets of shapes at most
        for name in args.contenders:
            case = f"{model}, {name}"
            if name in report["missing_peers"] or not schedule.allows(case):
                continue
            try:
                yield from bench_contender(
                    args, device, pieces, schedule, report, rate, model, name
                )
            except Exception as error:
                report["failed" if name in OURS else "missing_peers"][case] = (
                    f"{type(error).__name__}: {error}"
                )


def bench_contender(
    args: argparse.Namespace,
    device: CudaDevice,
    pieces: Pieces,
    schedule: Schedule,
    report: dict[str, Any],
    rate: float,
    model: str,
    name: str,
) -> Iterator[dict[str, Any]]:
    """One row per batch; none where a check fails, which ``report`` then names."""
    spec, case = resolve(MODELS[model]), f"{model}, {name}"
    if name in OURS:
        found = report["checks"][case] = check(name, spec, pieces)
        if not found["passed"]:
            report["failed"][case] = f"not what the dequantised weights give: {found}"
            return
    linears = make(name, spec, pieces)
    for batch in args.batches:
        if schedule.allows(f"{case}, batch {batch}"):
            yield {
                "model": model,
                "contender": name,
                **time_steps(args, device, spec, linears, pieces, batch, rate),
            }


def open_pieces(device: CudaDevice, report: dict[str, Any]) -> Pieces:
    """Compiled ones on a GPU; where they cannot be, plain ones for all, without fp8, and the
    reason in ``report``."""
    if isinstance(device, Rehearsal):
        report["pieces"] = "plain torch"
        return Pieces()
    try:
        pieces = Pieces.compiled()
    except Exception as error:
        report["pieces"] = f"plain torch, as torch.compile fails: {type(error).__name__}: {error}"
        report["missing_peers"]["fp8"] = (
            "torch.compile fails, and quantising in five kernels would be no fair peer"
        )
        return Pieces()
    report["pieces"] = "torch.compile"
    return pieces


def run(args: argparse.Namespace, device: CudaDevice) -> dict[str, Any]:
    """The report, as it is written."""
    schedule = Schedule(args.minutes)
    floors = device.floors()
    report: dict[str, Any] = {
        "machine": device.facts(),
        "packages": packages(),
        "floors": floors.record(),
        "missing_peers": {},
        "checks": {},
        "failed": {},
    }
    pieces = open_pieces(device, report)
    results = list(bench(args, device, pieces, schedule, report, floors.read_bytes))
    bf16 = {(r["model"], r["batch"]): r["ms_per_step"] for r in results if r["contender"] == "bf16"}
    for r in results:
        base = bf16.get((r["model"], r["batch"]))
        r["bf16_ratio"] = None if base is None else round(base / r["ms_per_step"], 3)
    return report | {"left_out": schedule.left_out, "results": results}


def show(report: dict[str, Any], console: Console) -> None:
    """The report as a table and what is not in it."""
    heads = (
        "model",
        "contender",
        "batch",
        "ms a step",
        "best",
        "tokens/s",
        "bf16 / it",
        "weights GB",
        "floor ms",
        "of floor",
        "peak GB",
    )
    table = Table(*heads, box=MARKDOWN, title="Decode", title_justify="left")
    for r in report["results"]:
        peak, ratio = r["peak_memory_bytes"], r["bf16_ratio"]
        table.add_row(
            r["model"],
            r["contender"],
            str(r["batch"]),
            f"{r['ms_per_step']:.3f}",
            f"{r['best_ms_per_step']:.3f}",
            f"{r['tokens_per_s']:.0f}",
            "-" if ratio is None else f"{ratio:.2f}",
            f"{r['weight_bytes'] / 1e9:.3f}",
            f"{r['floor_ms']:.3f}",
            f"{r['share_of_floor']:.0%}",
            "-" if peak is None else f"{peak / 1e9:.1f}",
        )
    console.print(report["machine"], report["packages"], report["floors"], table, sep="\n")
    console.print(f"between the linears: {report['pieces']}", markup=False)
    for case, found in report["checks"].items():
        console.print(
            f"checked: {case}: cosines {found['cosines']}, least {found['least']}", markup=False
        )
    for heading, reasons in (
        ("not measured", report["missing_peers"]),
        ("FAILED", report["failed"]),
    ):
        for case, reason in reasons.items():
            console.print(f"{heading}: {case}: {reason}", markup=False)
    for case in report["left_out"]:
        console.print(f"left out, time was up: {case}", markup=False)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda")
    parser.add_argument(
        "--dry-run", action="store_true", help="the same code on the CPU, on a tiny model"
    )
    parser.add_argument("--models", nargs="+", choices=list(MODELS))
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=list(CONTENDERS))
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 16, 64])
    parser.add_argument(
        "--context", type=int, help="positions that attention reads; 1024, of a dry run 32"
    )
    parser.add_argument("--rounds", type=int, default=5, help="measurements of each case")
    parser.add_argument("--seconds", type=float, help="least length of one measurement")
    parser.add_argument("--minutes", type=float, default=1.5, help="begin no case after this long")
    parser.add_argument(
        "--json",
        type=Path,
        metavar="FILE",
        help="of the report; a GPU's default: results/GPU/decode.json",
    )
    args = parser.parse_args(arguments)
    args.models = args.models or (["rehearsal"] if args.dry_run else ["Llama-3-8B", "Llama-3.2-1B"])
    args.context = args.context or (32 if args.dry_run else 1024)
    args.seconds = args.seconds or (1e-3 if args.dry_run else 0.05)
    return args


def main() -> int:
    """Parse the options, run, and print a table; 1 if a contender of ours failed."""
    args = parse()
    os.environ.setdefault(
        "TORCHINDUCTOR_COMPILE_THREADS", "1"
    )  # starting its processes takes longer than its few kernels
    if args.dry_run:
        device: CudaDevice = open_rehearsal()
    else:
        device = Rehearsal() if args.device == "cpu" else open_cuda("decode.py --device cuda")
    report = run(args, device)
    output = args.json
    if output is None and not isinstance(device, Rehearsal):
        output = RESULTS / device.name / "decode.json"
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps(report, indent=1) + "\n")
    show(report, Console(width=None if sys.stdout.isatty() else 200))
    return 1 if report["failed"] else 0


if __name__ == "__main__":
    sys.exit(main())
