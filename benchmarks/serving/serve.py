# SPDX-License-Identifier: Apache-2.0
"""End-to-end speed: models served by vLLM as we, its 16-bit path and its own quantized paths serve
them, and beside llama.cpp.

Every contender of a model is started once (start-up seconds, memory) and stays up; then ``vllm
bench serve`` measures them in turn, cell by cell and round by round, so that a drift of the machine
meets all alike. A cell is a batch of requests sent at once. The client shares the cores with the
server, as it does on a user's machine.

    python -m benchmarks.serving.serve --models SmolLM2-135M --quick --json serve.json
    python -m benchmarks.serving.serve --device cuda

The file is rewritten after each measured cell. On a GPU the servers of a model share its memory
(devices.py).
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

from openai import OpenAIError
from rich.console import Console

from benchmarks.serving import llama_cpp
from benchmarks.serving.contender import Cell, Contender
from benchmarks.serving.devices import CpuServing, open_device
from benchmarks.serving.models import (
    MODELS,
    OURS,
    PEERS,
    SCHEMES,
    default_folder,
    kv_bytes_per_token,
    linear_parameters,
    read_bytes,
    read_config,
    scheme_model,
)
from benchmarks.support.commands import options, unwind_on_sigterm
from benchmarks.support.machine import packages
from benchmarks.support.report import Schedule, save, show_facts, show_table, terminal
from benchmarks.support.server import ServerError, VllmServer, memory
from benchmarks.support.timing import Floors

# Unless the command line says otherwise. A GPU's servers start in this order, in case the time does
# not last for all.
DEFAULTS: dict[str, dict[str, list[str]]] = {
    "cpu": {"models": ["Llama-3.2-1B"], "schemes": ["bf16", *PEERS, "best_w4a8", "balanced_w4a8"]},
    "cuda": {
        "models": ["Llama-3.2-1B", "Llama-3-8B-4-layers"],
        "schemes": ["bf16", "best_w4a8", "w4a16", "w8a8", "best_w4a4"],
    },
}
STARTS_SHARE = 0.6
"""Of ``--minutes``: after it no server is started, so that those which are up get measured."""
EIGHT_BIT_ACTIVATIONS = ("w8a8", *llama_cpp.FILE_TYPES, *OURS)
"""Multiplied as int8, four-bit ones too where the device has no int4 products."""
console = Console(stderr=True)


ALL_CELLS = tuple(Cell(batch, prompt) for prompt in (128, 1024) for batch in (1, 4, 16, 64))
# Decoding alone, a batch that decodes, a prompt that is read: an output of 2 leaves a time per
# token and little else.
QUICK_CELLS = (Cell(1, 128), Cell(16, 32), Cell(1, 1024, 2))


def parse_arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    """Options of the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--device", choices=list(DEFAULTS), default="cpu")
    add("--models", nargs="+", choices=MODELS)
    calib = "calibration text of ours, of real models"
    add("--calib", default="generated", help=calib)
    add("--schemes", nargs="+", choices=SCHEMES)
    cells = f"{len(QUICK_CELLS)} cells instead of {len(ALL_CELLS)}"
    add("--quick", action="store_true", help=cells)
    add("--rounds", type=int, default=3, help="measurements of each cell and contender")
    minutes = f"begin no cell after this long, no server after {STARTS_SHARE:.0%}% of it"
    add("--minutes", type=float, help=minutes)
    add("--eager", action="store_true", help="serve with --enforce-eager: starts sooner")
    executor = "--distributed-executor-backend of every server, instead of what each chooses"
    add("--executor", help=executor)
    add("--folder", type=Path, default=default_folder(), help="where models are made and kept")
    add(
        "--json",
        type=Path,
        help="of the report; cuda: results/GPU/serve.json unless told otherwise",
    )
    args = parser.parse_args(words)
    if args.rounds < 1:
        parser.error(f"--rounds {args.rounds}: expected at least 1")
    for name, value in DEFAULTS[args.device].items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if args.device == "cuda" and set(args.schemes) & set(llama_cpp.FILE_TYPES):
        parser.error("--schemes: llama.cpp is run on CPUs only, without --device cuda")
    return args


def main() -> int:
    """Measure and print tables."""
    args = parse_arguments()
    unwind_on_sigterm()
    schedule = Schedule(args.minutes)
    device = open_device(args.device)
    try:
        floors = device.floors()
        report = {
            "machine": device.facts(),
            "packages": packages(),
            "options": {name: getattr(args, name) for name in ("rounds", "eager", "executor")},
            "floors": floors.record(),
            "missing": {},
            "left_out": schedule.left_out,
            "results": [],
        }
        args.json = args.json or device.output
        for model in args.models:
            measure_model(model, args, report, floors, device, schedule)
    except KeyboardInterrupt:
        console.print("[yellow]stopped; servers are down, finished cells are kept in --json[/]")
        return 130
    except (ServerError, RuntimeError, ValueError, subprocess.CalledProcessError) as error:
        console.print(f"serve.py: {error}", markup=False, highlight=False, soft_wrap=True)
        return 1
    show(report, terminal())
    return 0


def measure_model(
    model: str,
    args: argparse.Namespace,
    report: dict[str, Any],
    floors: Floors,
    device: CpuServing,
    schedule: Schedule,
    judge: Callable[[Contender], dict[str, float]] | None = None,
) -> None:
    """Add the rows of every cell, and what ``judge`` finds of each contender after that."""
    cells = QUICK_CELLS if args.quick else ALL_CELLS

    def miss(scheme: str, error: Exception) -> None:
        # Its last line: those before are a log with this machine's paths.
        report["missing"][f"{model} {scheme}"] = str(error).strip().splitlines()[-1]
        console.print(f"{model} {scheme}: takes no part any more: {error}", markup=False)

    with ExitStack() as stack:
        logs = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        contenders = []
        for scheme in args.schemes:
            if not schedule.allows(f"{model} {scheme}", STARTS_SHARE):
                continue
            console.print(f"{model} {scheme}: starting", highlight=False)
            try:
                contenders.append(start(model, scheme, args, cells, logs, stack, device))
            except (ServerError, OpenAIError, ImportError) as error:
                miss(scheme, error)
        for cell in cells:
            if not schedule.allows(f"{model} {asdict(cell)}"):
                continue
            rounds: dict[str, list[dict[str, float]]] = {c.scheme: [] for c in contenders}
            for number in range(args.rounds):
                for contender in list(contenders):
                    try:
                        measured = contender.measure(cell, number, logs)
                    except RuntimeError as error:
                        contenders.remove(contender)
                        miss(contender.scheme, error)
                        continue
                    rounds[contender.scheme].append(measured)
                    case = f"{model} {contender.scheme} {asdict(cell)} round {number + 1}"
                    text = ", ".join(f"{name} {value:.4g}" for name, value in measured.items())
                    console.print(f"{case}: {text}", highlight=False, soft_wrap=True)
            for contender in contenders:
                report["results"].append(
                    row(model, contender, cell, rounds[contender.scheme], floors)
                )
            save(report, args.json)
        for contender in contenders if judge else ():
            assert judge is not None
            report["judged"][contender.scheme] = judge(contender)
            save(report, args.json)


def start(
    model: str,
    scheme: str,
    args: argparse.Namespace,
    cells: Sequence[Cell],
    logs: Path,
    stack: ExitStack,
    device: CpuServing,
) -> Contender:
    """Serve ``scheme`` until ``stack`` closes; the first request is answered before this returns.

    Raises:
        ServerError: the server ended or did not answer.
        OpenAIError: it does not answer the first request.
        ImportError: llama-cpp-python is not installed.
    """
    directory = scheme_model(model, scheme, args.folder, args.calib)
    if scheme in llama_cpp.FILE_TYPES:
        return Contender(scheme, directory)
    tokens = max(c.batch * (c.prompt + c.output) for c in cells)
    cache = -(-tokens * kv_bytes_per_token(read_config(directory)) // (1 << 30)) << 30
    words = options(
        max_model_len=max(c.prompt + c.output for c in cells) + 64,
        no_enable_prefix_caching=True,
        dtype="bfloat16",
        max_num_seqs=max(c.batch for c in cells),
        enforce_eager=args.eager,
        distributed_executor_backend=args.executor,
    )
    words += device.options(cache, len(args.schemes))
    used, began = device.used_bytes(), time.perf_counter()
    environment = device.environment(cache)
    server = stack.enter_context(
        VllmServer(directory, logs / f"{scheme}.log", *words, environment=environment)
    )
    seconds = time.perf_counter() - began
    loaded = memory(server.pid, "VmRSS")
    server.client.completions.create(model=server.model, prompt="The first request", max_tokens=8)
    gpu = max(0, device.used_bytes() - used)
    return Contender(scheme, directory, server, seconds, loaded, gpu_bytes=gpu)


def row(
    model: str,
    contender: Contender,
    cell: Cell,
    rounds: Sequence[Mapping[str, float]],
    floors: Floors,
) -> dict[str, Any]:
    """One result: medians over the rounds, the rounds, and what belongs to the contender."""
    medians = {name: round(statistics.median(r[name] for r in rounds), 3) for name in rounds[0]}
    return {
        "model": model,
        "scheme": contender.scheme,
        **asdict(cell),
        **medians,
        **floor(contender.scheme, contender.directory, cell, floors),
        "peak_rss_bytes": contender.peak_rss_bytes,
        "loaded_rss_bytes": contender.loaded_rss_bytes,
        "gpu_bytes": contender.gpu_bytes,
        "startup_s": round(contender.startup_s, 2),
        "rounds": [dict(r) for r in rounds],
    }


def floor(scheme: str, directory: Path, cell: Cell, floors: Floors) -> dict[str, float]:
    """Least milliseconds of a decode step and of reading the prompts.

    Weights are read from DRAM once; with 8-bit activations, which is what the peak rate is of,
    weights of the decoder layers are multiplied once a token. Keys, values and attention count
    nothing.
    """
    linears = linear_parameters(read_config(directory))
    read = read_bytes(directory) / floors.read_bytes
    int4 = scheme in OURS and OURS[scheme][1] == 4
    rate = floors.multiply_adds_of(int4) if scheme in EIGHT_BIT_ACTIVATIONS else None

    def seconds(tokens: int) -> float:
        return max(read, tokens * linears / rate) if rate else read

    return {
        "tpot_floor_ms": round(seconds(cell.batch) * 1e3, 3),
        "ttft_floor_ms": round(seconds(cell.batch * cell.prompt) * 1e3, 3),
    }


def show(report: Mapping[str, Any], console: Console) -> None:
    """Speed by cell, beside its floor and beside 16 bit; start-up and memory; what did not run."""
    results = report["results"]
    same = ("model", "batch", "prompt", "output")
    bf16 = {tuple(r[name] for name in same): r for r in results if r["scheme"] == "bf16"}

    def beside(r: Mapping[str, Any], name: str) -> float:
        """Of bf16 by ours, in the same cell."""
        return float(bf16[tuple(r[key] for key in same)][name] / r[name])

    contender = {"model": lambda r: r["model"], "scheme": lambda r: r["scheme"]}
    speed = {
        "batch": lambda r: r["batch"],
        "prompt": lambda r: r["prompt"],
        "TTFT ms": lambda r: f"{r['ttft_ms']:.0f}",
        "TPOT ms": lambda r: f"{r['tpot_ms']:.1f}",
        "of floor": lambda r: f"{r['tpot_floor_ms'] / r['tpot_ms']:.0%}",
        "tokens/s": lambda r: f"{r['tokens_per_s']:.1f}",
        "TTFT, bf16 / it": lambda r: f"{beside(r, 'ttft_ms'):.2f}",
        "TPOT, bf16 / it": lambda r: f"{beside(r, 'tpot_ms'):.2f}",
        "tokens/s, it / bf16": lambda r: f"{1 / beside(r, 'tokens_per_s'):.2f}",
    }
    startup = {
        "start-up s": lambda r: f"{r['startup_s']:.1f}",
        "RSS loaded, MB": lambda r: f"{r['loaded_rss_bytes'] / 1e6:.0f}",
        "RSS peak, MB": lambda r: f"{r['peak_rss_bytes'] / 1e6:.0f}",
        "GPU, MB": lambda r: f"{r['gpu_bytes'] / 1e6:.0f}" if r["gpu_bytes"] else "-",
    }
    last = {(r["model"], r["scheme"]): r for r in results}.values()
    show_table(console, "Serving", contender | speed, results)
    show_table(console, "Start-up and memory", contender | startup, last)
    show_facts(report, console)


if __name__ == "__main__":
    sys.exit(main())
