# SPDX-License-Identifier: Apache-2.0
"""Decode steps of whole models without vLLM: a plain torch Llama on random weights, one CUDA graph
a step.

    python -m benchmarks.kernels.decode --minutes 1.5 --json decode.json

Contenders differ in their linears alone (decode_linears.py). Before ours are timed, their linears
and logits are held against those of a bfloat16 model of the same dequantized weights: a wrong
scale, rotation or order would show there.
"""

import argparse
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from benchmarks.kernels.cuda import CudaDevice, Rehearsal, open_cuda
from benchmarks.kernels.decode_linears import (
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
from benchmarks.kernels.decode_model import Llama, Pieces, State
from benchmarks.kernels.schemes import CONFIGS, preset_schema
from benchmarks.support.machine import packages
from benchmarks.support.random_models import COMMON
from benchmarks.support.report import RESULTS, Schedule, save, show_facts, show_table, terminal
from benchmarks.support.timing import time_alternately
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
    """Hold one of ours, two layers of it, against its dequantized weights."""
    preset, act_bits = OURS[name]
    spec = replace(spec, layers=CHECKED_LAYERS)
    weights = list(stored_weights(spec, preset_schema(spec, preset, act_bits)))
    found = agreement(spec, weights, [weight.dequantized() for weight in weights], pieces)
    return {"cosines": found, "least": LEAST_COSINES[act_bits], "passed": agrees(found, act_bits)}


@dataclass(frozen=True)
class Run:
    """What all cases of a run share; what fails is put into ``report``: ours as failed, peers as
    missing."""

    args: argparse.Namespace
    device: CudaDevice
    pieces: Pieces
    schedule: Schedule
    report: dict[str, Any]
    rate: float
    """Bytes/s of the floor."""

    def results(self) -> Iterator[dict[str, Any]]:
        """One row per model, contender and batch."""
        for model in self.args.models:
            torch.compiler.reset()  # it compiles a function for eight sets of shapes at most
            for name in self.args.contenders:
                case = f"{model}, {name}"
                if name in self.report["missing"] or not self.schedule.allows(case):
                    continue
                try:
                    yield from self.contender(model, name)
                except Exception as error:
                    self.report["failed" if name in OURS else "missing"][case] = (
                        f"{type(error).__name__}: {error}"
                    )

    def contender(self, model: str, name: str) -> Iterator[dict[str, Any]]:
        """One row per batch; none where a check fails."""
        spec, case = resolve(MODELS[model]), f"{model}, {name}"
        if name in OURS:
            found = self.report["checks"][case] = check(name, spec, self.pieces)
            if not found["passed"]:
                self.report["failed"][case] = f"not what the dequantized weights give: {found}"
                return
        linears = make(name, spec, self.pieces)
        for batch in self.args.batches:
            if self.schedule.allows(f"{case}, batch {batch}"):
                yield {"model": model, "contender": name, **self.step(spec, linears, batch)}

    def step(self, spec: ModelSpec, linears: Linears, batch: int) -> dict[str, Any]:
        """Milliseconds of a step, its floor, and the most memory that the model took."""
        args, device = self.args, self.device
        if not isinstance(device, Rehearsal):
            torch.cuda.reset_peak_memory_stats()
        state = State.random(spec, batch, args.context, linears.tied)
        model = Llama(spec, linears.layers, linears.head, state, self.pieces)
        model.step()  # compiles and prepares what a graph cannot
        calls = {"step": device.graph(model.step, 1)}
        timing = time_alternately(calls, args.rounds, args.seconds, device.new_clock())["step"]
        on_gpu = state.tokens.is_cuda
        floor = (linears.weight_bytes + state.cache_bytes) / self.rate
        return {
            "batch": batch,
            "context": args.context,
            "ms_per_step": round(timing.median * 1e3, 4),
            "best_ms_per_step": round(timing.best * 1e3, 4),
            "tokens_per_s": round(batch / timing.median, 1),
            "weight_bytes": linears.weight_bytes,
            "cache_bytes": state.cache_bytes,
            "weight_floor_ms": round(linears.weight_bytes / self.rate * 1e3, 4),
            "floor_ms": round(floor * 1e3, 4),
            "share_of_floor": round(floor / timing.median, 4),
            "peak_memory_bytes": torch.cuda.max_memory_allocated() if on_gpu else None,
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
        report["missing"]["fp8"] = (
            "torch.compile fails, and quantizing in five kernels would be no fair peer"
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
        "missing": {},
        "checks": {},
        "failed": {},
    }
    pieces = open_pieces(device, report)
    results = list(Run(args, device, pieces, schedule, report, floors.read_bytes).results())
    bf16 = {(r["model"], r["batch"]): r["ms_per_step"] for r in results if r["contender"] == "bf16"}
    for r in results:
        base = bf16.get((r["model"], r["batch"]))
        r["bf16_ratio"] = None if base is None else round(base / r["ms_per_step"], 3)
    return report | {"left_out": schedule.left_out, "results": results}


def show(report: dict[str, Any], console: Console) -> None:
    """The report as a table and what is not in it."""
    columns = {
        "model": lambda r: r["model"],
        "contender": lambda r: r["contender"],
        "batch": lambda r: r["batch"],
        "ms a step": lambda r: f"{r['ms_per_step']:.3f}",
        "tokens/s": lambda r: f"{r['tokens_per_s']:.0f}",
        "bf16 / it": lambda r: r["bf16_ratio"],
        "weights GB": lambda r: f"{r['weight_bytes'] / 1e9:.3f}",
        "of floor": lambda r: f"{r['share_of_floor']:.0%}",
        "peak GB": lambda r: f"{r['peak_memory_bytes'] / 1e9:.1f}",
    }
    show_table(console, "Decode", columns, report["results"])
    console.print(f"between the linears: {report['pieces']}", markup=False)
    for case, found in report["checks"].items():
        console.print(f"checked: {case}: {found}", markup=False)
    show_facts(report, console)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
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
    device = open_cuda("decode.py", args.dry_run)
    report = run(args, device)
    output = args.json or (None if args.dry_run else RESULTS / device.name / "decode.json")
    save(report, output)
    show(report, terminal())
    return 1 if report["failed"] else 0


if __name__ == "__main__":
    sys.exit(main())
