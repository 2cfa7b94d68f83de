# SPDX-License-Identifier: Apache-2.0
"""End-to-end speed: models served by vLLM as we, its 16-bit path and its own quantised paths serve
them, and beside llama.cpp.

Every contender of a model is started once (start-up seconds, memory) and stays up; then ``vllm
bench serve`` measures them in turn, cell by cell and round by round, so that a drift of the machine
meets all alike. A cell is a batch of requests sent at once. The client shares the cores with the
server, as it does on a user's machine.

    python benchmarks/serve.py --models SmolLM2-135M Llama-3.2-1B --quick --output serve.json
    python benchmarks/serve.py --device cuda

``--output`` is rewritten after each measured cell; the same command goes on where an interrupted
one stopped. On a GPU the servers of a model share its memory (serve_device_cuda.py).
"""

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from common import Floors, Schedule, packages
from llama_cpp_peer import FILE_TYPES as GGUF
from llama_cpp_peer import measure as measure_llama_cpp
from models import (
    MODELS,
    OURS,
    PEERS,
    SCHEMES,
    default_folder,
    kv_bytes_per_token,
    linear_parameters,
    read_config,
    scheme_model,
)
from openai import OpenAIError
from rich.console import Console
from serve_devices import ServeDevice, open_device
from serve_report import show
from serving import ServerError, VllmServer, memory

# Unless the command line says otherwise. A GPU's servers start in this order, in case the time does
# not last for all.
DEFAULTS: dict[str, dict[str, Any]] = {
    "cpu": {"models": ["SmolLM2-135M", "Llama-3.2-1B"], "schemes": ["bf16", *PEERS, "w4a8"]},
    "cuda": {
        "models": ["Llama-3.2-1B", "Llama-3-8B-4-layers"],
        "schemes": ["bf16", "w4a8", "w4a16", "w8a8", "w4a4"],
    },
}
STARTS_SHARE = 0.6
"""Of ``--minutes``: after it no server is started, so that those which are up get measured."""
# Q4_0 and Q8_0 have a 16-bit scale for 32 weights; llama.cpp rounds activations to 8 bits.
WEIGHT_BITS = {"bf16": 16, "w8a8": 8, "q4_0": 4.5, "q8_0": 8.5} | dict.fromkeys(["w4a16", *OURS], 4)
HEAD = "--lm-head-bits"
HEAD_BITS = {
    scheme: float(options[options.index(HEAD) + 1])
    for scheme, options in OURS.items()
    if HEAD in options
}
HEAD_BITS |= {"q4_0": 6.5625, "q8_0": 8.5}
EIGHT_BIT_ACTIVATIONS = ("w8a8", *GGUF, *OURS)
"""Multiplied as int8, four-bit ones too where the device has no int4 products."""
BATCHES, PROMPTS = (1, 4, 16, 64), (128, 1024)
OUTPUT_TOKENS = 32
OUTPUT_HELP = (
    "write the JSON object to this file, cell by cell, and go on from it; cuda:"
    " results/GPU/serve.json, begun anew"
)
console = Console(stderr=True)


@dataclass(frozen=True)
class Cell:
    """``batch`` requests at once of ``prompt`` tokens each, which are answered with ``output``
    tokens each."""

    batch: int
    prompt: int
    output: int = OUTPUT_TOKENS


ALL_CELLS = tuple(Cell(batch, prompt) for prompt in PROMPTS for batch in BATCHES)
# Decoding alone, a batch that decodes, a prompt that is read: an output of 2 leaves a time per
# token and little else.
QUICK_CELLS = (Cell(1, 128), Cell(16, 32), Cell(1, 1024, 2))


@dataclass
class Contender:
    """One way to serve a model: a vLLM server that is up and running, or llama.cpp in a process
    for each measurement."""

    scheme: str
    directory: Path
    server: VllmServer | None = None
    startup_s: float = 0.0
    loaded_rss_bytes: int = 0
    seen_rss_bytes: int = 0
    gpu: dict[str, Any] = field(default_factory=dict)
    """GPU memory after the first request, by when a server has all it needs; empty on a CPU."""

    @property
    def peak_rss_bytes(self) -> int:
        """Largest resident memory of each process of the server, added up; shared pages count in
        each."""
        return self.seen_rss_bytes if self.server is None else memory(self.server.pid, "VmHWM")

    def measure(self, cell: Cell, number: int, folder: Path) -> dict[str, float]:
        """``ttft_ms``, ``tpot_ms`` and ``tokens_per_s`` of one round of a cell.

        Raises:
            RuntimeError: it failed.
        """
        if self.server is not None:
            return bench(self.server, cell, number, folder)
        found = measure_llama_cpp(self.directory, cell.batch, cell.prompt, cell.output)
        self.startup_s = found.pop("startup_s")
        self.loaded_rss_bytes = self.seen_rss_bytes = max(
            self.seen_rss_bytes, int(found.pop("peak_rss_bytes"))
        )
        return found


def parse_arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    """Options of the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=list(DEFAULTS), default="cpu")
    parser.add_argument("--models", nargs="+", choices=MODELS)
    parser.add_argument("--schemes", nargs="+", choices=SCHEMES)
    parser.add_argument(
        "--quick", action="store_true", help=f"{len(QUICK_CELLS)} cells instead of {len(ALL_CELLS)}"
    )
    parser.add_argument(
        "--rounds", type=int, default=3, help="measurements of each cell and contender"
    )
    parser.add_argument(
        "--minutes",
        type=float,
        help=f"begin no cell after this long, no server after {STARTS_SHARE:.0%}% of it",
    )
    parser.add_argument(
        "--eager",
        action="store_true",
        help="serve with --enforce-eager: starts sooner, decodes slower",
    )
    parser.add_argument(
        "--executor",
        help="--distributed-executor-backend of every server, instead of what each chooses",
    )
    parser.add_argument(
        "--folder", type=Path, default=default_folder(), help="where models are made and kept"
    )
    parser.add_argument("--prepare", action="store_true", help="make the models and end")
    parser.add_argument(
        "--json", action="store_true", help="print one JSON object and nothing else"
    )
    parser.add_argument("--output", type=Path, help=OUTPUT_HELP)
    args = parser.parse_args(words)
    if args.rounds < 1:
        parser.error(f"--rounds {args.rounds}: expected at least 1")
    for name, value in DEFAULTS[args.device].items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    cpu_only = [scheme for scheme in args.schemes if scheme in GGUF]
    if args.device == "cuda" and cpu_only:
        parser.error(
            f"--schemes {' '.join(cpu_only)}: llama.cpp is run on CPUs only; leave them out with"
            " --device cuda"
        )
    return args


def main() -> int:
    """Measure, and print tables or JSON."""
    args = parse_arguments()
    signal.signal(signal.SIGTERM, _terminate)
    if args.prepare:
        for model in args.models:
            for scheme in args.schemes:
                console.print(str(scheme_model(model, scheme, args.folder)), highlight=False)
        return 0
    schedule = Schedule(args.minutes)
    device = open_device(args.device)
    try:
        report = open_report(args, device)
        report["left_out"] = schedule.left_out
        args.output = args.output or device.output
        for model in args.models:
            measure_model(model, args, report, device, schedule)
    except KeyboardInterrupt:
        console.print("[yellow]stopped; servers are down, finished cells are kept in --output[/]")
        return 130
    except (ServerError, RuntimeError, ValueError, subprocess.CalledProcessError) as error:
        console.print(
            f"serve.py: {error}", style="bold red", markup=False, highlight=False, soft_wrap=True
        )
        return 1
    if args.json:
        sys.stdout.write(json.dumps(report, indent=1) + "\n")
    else:
        show(report, Console(width=None if sys.stdout.isatty() else 130))
    return 0


def open_report(args: argparse.Namespace, device: ServeDevice) -> dict[str, Any]:
    """The report to go on with: that in ``--output``, or one without results.

    Raises:
        ValueError: the file was written with other options or packages or on another machine, or is
            no report.
    """
    options = {
        "rounds": args.rounds,
        "eager": args.eager,
        "executor": args.executor,
        "device": args.device,
    }
    facts = device.facts()
    here = {"options": options, "packages": packages()} | {
        name: facts[name] for name in ("cpu", "cores", "gpu") if name in facts
    }
    if args.output and args.output.exists():
        report: dict[str, Any] = json.loads(args.output.read_text())
        found = {name: report.get(name, report.get("machine", {}).get(name)) for name in here}
        if found != here:
            raise ValueError(
                f"--output {args.output}: expected a report of {here}, got one of {found}. Give"
                " another file, or remove this one."
            )
        return report
    return {
        "machine": facts,
        "packages": packages(),
        "options": options,
        "floors": device.floors().record(),
        "prepack": device.prepack(),
        "missing": {
            name: reason for name, reason in device.other_peers.items() if name not in packages()
        },
        "results": [],
    }


def measure_model(
    model: str,
    args: argparse.Namespace,
    report: dict[str, Any],
    device: ServeDevice,
    schedule: Schedule,
) -> None:
    """Add the rows of the cells that the report lacks."""
    cells = [
        c
        for c in (QUICK_CELLS if args.quick else ALL_CELLS)
        if not all(has(report, model, s, c) for s in args.schemes)
    ]
    if not cells:
        console.print(f"{model}: every cell is in the report already")
        return
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
                miss(report, model, scheme, error)
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
                        miss(report, model, contender.scheme, error)
                        continue
                    rounds[contender.scheme].append(measured)
                    text = ", ".join(f"{name} {value:.4g}" for name, value in measured.items())
                    console.print(
                        f"{model} {contender.scheme} {asdict(cell)} round {number + 1}: {text}",
                        highlight=False,
                    )
            floors = Floors.recorded(report["floors"])
            for contender in contenders:
                report["missing"].pop(f"{model} {contender.scheme}", None)
                drop(report, model, contender.scheme, cell)
                report["results"].append(
                    row(model, contender, cell, rounds[contender.scheme], floors)
                )
            save(report, args.output)
    save(report, args.output)


def miss(report: dict[str, Any], model: str, scheme: str, error: Exception) -> None:
    """Name a contender that takes no part any more, and why."""
    report["missing"][f"{model} {scheme}"] = str(error)
    console.print(
        f"{model} {scheme}: takes no part any more: {error}",
        style="red",
        markup=False,
        highlight=False,
    )


def start(
    model: str,
    scheme: str,
    args: argparse.Namespace,
    cells: Sequence[Cell],
    logs: Path,
    stack: ExitStack,
    device: ServeDevice,
) -> Contender:
    """Serve ``scheme`` until ``stack`` closes; the first request is answered before this returns.

    Raises:
        ServerError: the server ended or did not answer.
        OpenAIError: it does not answer the first request.
        ImportError: llama-cpp-python is not installed.
    """
    directory = scheme_model(model, scheme, args.folder)
    if scheme in GGUF:
        return Contender(scheme, directory)
    tokens = max(c.batch * (c.prompt + c.output) for c in cells)
    cache = -(-tokens * kv_bytes_per_token(read_config(directory)) // (1 << 30)) << 30
    options = [
        "--max-model-len",
        str(max(c.prompt + c.output for c in cells) + 64),
        "--no-enable-prefix-caching",
    ]
    options += ["--dtype", "bfloat16", "--max-num-seqs", str(max(c.batch for c in cells))]
    options += ["--enforce-eager"] if args.eager else []
    options += ["--distributed-executor-backend", args.executor] if args.executor else []
    options += device.options(cache, len(args.schemes))
    gpu_memory = device.watch()
    began = time.perf_counter()
    server = stack.enter_context(
        VllmServer(
            directory, logs / f"{scheme}.log", *options, environment=device.environment(cache)
        )
    )
    seconds = time.perf_counter() - began
    loaded = memory(server.pid, "VmRSS")
    server.client.completions.create(model=server.model, prompt="The first request", max_tokens=8)
    return Contender(scheme, directory, server, seconds, loaded, gpu=gpu_memory(server.pid))


def bench(server: VllmServer, cell: Cell, number: int, folder: Path) -> dict[str, float]:
    """Medians that ``vllm bench serve`` reports for one batch of random prompts.

    Raises:
        RuntimeError: the command failed, or a request did.
    """
    command = [
        str(Path(sys.executable).with_name("vllm")),
        "bench",
        "serve",
        "--base-url",
        server.url,
    ]
    command += [
        "--model",
        server.model,
        "--dataset-name",
        "random",
        "--random-input-len",
        str(cell.prompt),
    ]
    command += [
        "--random-output-len",
        str(cell.output),
        "--num-prompts",
        str(cell.batch),
        "--seed",
        str(number),
    ]
    command += [
        "--max-concurrency",
        str(cell.batch),
        "--ignore-eos",
        "--temperature",
        "0",
        "--disable-tqdm",
    ]
    command += ["--save-result", "--result-dir", str(folder), "--result-filename", "bench.json"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        raise RuntimeError(f"vllm bench serve of {server.model} failed:\n{result.stderr[-3000:]}")
    return figures(json.loads((folder / "bench.json").read_text()), cell)


def figures(measured: Mapping[str, Any], cell: Cell) -> dict[str, float]:
    """What is kept of a result of ``vllm bench serve``.

    Raises:
        RuntimeError: not every request was answered in full.
    """
    if (
        measured["completed"] != cell.batch
        or measured["total_output_tokens"] != cell.batch * cell.output
    ):
        raise RuntimeError(
            f"vllm bench serve: expected {cell.batch} answers of {cell.output} tokens, got"
            f" {measured['completed']} answers, {measured['total_output_tokens']} tokens in all"
        )
    return {
        "ttft_ms": measured["median_ttft_ms"],
        "tpot_ms": measured["median_tpot_ms"],
        "tokens_per_s": measured["output_throughput"],
    }


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
        **floor(contender.scheme, read_config(contender.directory), cell, floors),
        "peak_rss_bytes": contender.peak_rss_bytes,
        "loaded_rss_bytes": contender.loaded_rss_bytes,
        **contender.gpu,
        "startup_s": round(contender.startup_s, 2),
        "rounds": [dict(r) for r in rounds],
    }


def floor(scheme: str, config: Mapping[str, Any], cell: Cell, floors: Floors) -> dict[str, float]:
    """Least milliseconds of a decode step and of reading the prompts.

    Weights are read from DRAM once; with 8-bit activations, which is what the peak rate is of,
    weights of the decoder layers are multiplied once a token. Keys, values and attention count
    nothing.
    """
    linears, head = linear_parameters(config), config["vocab_size"] * config["hidden_size"]
    bits = WEIGHT_BITS[scheme]
    read = (linears * bits + head * HEAD_BITS.get(scheme, 16)) / 8 / floors.read_bytes

    rate = floors.multiply_adds if scheme in EIGHT_BIT_ACTIVATIONS else None
    if scheme == "w4a4" and floors.int4_multiply_adds:
        rate = floors.int4_multiply_adds

    def seconds(tokens: int) -> float:
        return max(read, tokens * linears / rate) if rate else read

    return {
        "tpot_floor_ms": round(seconds(cell.batch) * 1e3, 3),
        "ttft_floor_ms": round(seconds(cell.batch * cell.prompt) * 1e3, 3),
    }


def matches(result: Mapping[str, Any], model: str, scheme: str, cell: Cell) -> bool:
    """Is this the result of the cell?"""
    return (
        result["model"] == model
        and result["scheme"] == scheme
        and asdict(cell).items() <= result.items()
    )


def has(report: Mapping[str, Any], model: str, scheme: str, cell: Cell) -> bool:
    """Does the report hold the cell of this contender?"""
    return any(matches(result, model, scheme, cell) for result in report["results"])


def drop(report: dict[str, Any], model: str, scheme: str, cell: Cell) -> None:
    """Forget what an earlier run measured of the cell: ratios hold within one run alone."""
    report["results"] = [
        result for result in report["results"] if not matches(result, model, scheme, cell)
    ]


def save(report: Mapping[str, Any], output: Path | None) -> None:
    """Replace the file as a whole."""
    if output is None:
        return
    output.parent.mkdir(parents=True, exist_ok=True)
    new = output.with_name(output.name + ".new")
    new.write_text(json.dumps(report, indent=1) + "\n")
    os.replace(new, output)


def _terminate(signum: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
