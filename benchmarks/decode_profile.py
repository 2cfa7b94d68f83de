# SPDX-License-Identifier: Apache-2.0
"""Where a decode step goes: ``vllm bench latency --profile`` of one request, its operators' own
times in groups.

    python benchmarks/decode_profile.py --models SmolLM2-135M --schemes bf16 w4a8 --output
    profile.json

A step is what passes from one model execution to the next. What no operator accounts for, Python
and the engine, is the group "outside operators"; the profiler slows it down most, so shares are for
comparison and speed is what benchmarks/serve.py says.
"""

import argparse
import gzip
import itertools
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from common import machine, packages
from models import MODELS, SCHEMES, default_folder, read_config, scheme_model
from rich.console import Console
from rich.table import Table
from serving import small_machine

OUTSIDE = "outside operators"
# The first pattern found in the operator's name, or in the name of one that called it, decides.
GROUPS = (
    ("attention", re.compile(r"attention|reshape_and_cache|kv_cache")),
    (
        "linears",
        re.compile(
            r"smoothrot::|onednn|cpu_gemm_wna16|aten::(linear|mm|addmm|matmul)$|scaled_mm|weight_packed_linear"
        ),
    ),
    ("norms, activations, rotary", re.compile(r"rms_norm|silu|gelu|rotary|cpp_fused|layer_norm")),
    (
        "sampling",
        re.compile(r"argmax|softmax|exponential|topk|sort|multinomial|random|log_softmax"),
    ),
)
STEP = re.compile(r"execute_context_0\(0\)_generation_\d+\(\d+\)$")


def main() -> int:
    """Profile each scheme of each model, and print a table or JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--models", nargs="+", choices=MODELS, default=["SmolLM2-135M", "Llama-3.2-1B"]
    )
    parser.add_argument("--schemes", nargs="+", choices=SCHEMES, default=["bf16", "w4a8"])
    parser.add_argument("--output-len", type=int, default=32, help="decode steps")
    parser.add_argument(
        "--compiled",
        action="store_true",
        help="torch.compile as served; without, norms keep their names",
    )
    parser.add_argument(
        "--folder", type=Path, default=default_folder(), help="where models are made and kept"
    )
    parser.add_argument("--output", type=Path, help="write the result to this file as JSON")
    args = parser.parse_args()
    results = []
    for model in args.models:
        for scheme in args.schemes:
            directory = scheme_model(model, scheme, args.folder)
            events = trace(directory, args.output_len, args.compiled)
            results.append(
                {"model": model, "scheme": scheme, **decode_step(events, head_rows(directory))}
            )
    report = {
        "machine": machine(),
        "packages": packages(),
        "options": {"output_len": args.output_len, "compiled": args.compiled},
        "results": results,
    }
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(report, indent=1) + "\n")
    show(results, Console(width=None if sys.stdout.isatty() else 120))
    return 0


def trace(directory: Path, output_len: int, compiled: bool) -> list[dict[str, Any]]:
    """Events of the trace that vLLM's torch profiler writes of one request.

    Raises:
        RuntimeError: vLLM failed or wrote no trace of its worker.
    """
    with tempfile.TemporaryDirectory() as folder:
        command = [
            str(Path(sys.executable).with_name("vllm")),
            "bench",
            "latency",
            "--model",
            str(directory),
        ]
        command += [
            "--dtype",
            "bfloat16",
            "--max-model-len",
            "256",
            "--batch-size",
            "1",
            "--input-len",
            "16",
        ]
        command += [
            "--output-len",
            str(output_len),
            "--num-iters-warmup",
            "1",
            "--profile",
            "--disable-detokenize",
        ]
        command += [
            "--profiler-config.profiler",
            "torch",
            "--profiler-config.torch_profiler_dir",
            folder,
        ]
        command += ["--profiler-config.torch_profiler_with_stack", "false"]
        command += ["--profiler-config.torch_profiler_record_shapes", "true"]
        command += [] if compiled else ["--enforce-eager"]
        environment = {**os.environ, **small_machine(1), "VLLM_USE_AOT_COMPILE": "0"}
        environment["TORCHINDUCTOR_CPP_ENABLE_KERNEL_PROFILE"] = "1"
        result = subprocess.run(
            command, env=environment, capture_output=True, text=True, check=False
        )
        for file in Path(folder).glob("*.json*"):
            content = (
                gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
            )
            events: list[dict[str, Any]] = json.loads(content)["traceEvents"]
            if any(STEP.match(str(event.get("name"))) for event in events):
                return events
    raise RuntimeError(
        f"vllm bench latency --profile of {directory} left no trace of a decode"
        f" step:\n{result.stderr[-3000:]}"
    )


def head_rows(directory: Path) -> int:
    """Rows of the output head, by which its linear is known."""
    return int(read_config(directory)["vocab_size"])


def decode_step(events: Iterable[Mapping[str, Any]], vocabulary: int) -> dict[str, Any]:
    """Milliseconds of a median decode step and, on average over the steps, of each group and
    operator in one.

    Args:
        events: of a chrome trace; times in microseconds.
        vocabulary: rows of the output head; a linear whose shapes name as many, or padding to 64,
            is the head.
    """
    complete = [
        e for e in events if e.get("ph") == "X" and e.get("cat") in ("cpu_op", "user_annotation")
    ]
    steps = sorted((e for e in complete if STEP.match(e["name"])), key=lambda e: e["ts"])
    thread, begin, end = (steps[0]["pid"], steps[0]["tid"]), steps[0]["ts"], steps[-1]["ts"]
    count = len(steps) - 1
    inside = [
        e
        for e in complete
        if e["cat"] == "cpu_op" and begin <= e["ts"] < end and (e["pid"], e["tid"]) == thread
    ]
    groups: dict[str, float] = defaultdict(float)
    operators: dict[tuple[str, str], list[float]] = defaultdict(list)
    for event, callers, own in self_times(inside):
        group = group_of([*callers, event], vocabulary)
        groups[group] += own
        operators[group, label(event)].append(own)
    total = end - begin
    groups[OUTSIDE] = total - sum(groups.values())
    spans = [later["ts"] - earlier["ts"] for earlier, later in itertools.pairwise(steps)]
    most = sorted(operators.items(), key=lambda item: -sum(item[1]))[:25]
    return {
        "steps": count,
        "step_ms": round(statistics.median(spans) / 1e3, 4),
        "groups_ms": {
            name: round(us / count / 1e3, 4)
            for name, us in sorted(groups.items(), key=lambda item: -item[1])
        },
        "operators": [
            {
                "group": group,
                "operator": name,
                "calls": round(len(own) / count, 2),
                "ms": round(sum(own) / count / 1e3, 4),
            }
            for (group, name), own in most
        ],
    }


def self_times(
    events: Iterable[Mapping[str, Any]],
) -> list[tuple[Mapping[str, Any], list[Mapping[str, Any]], float]]:
    """Each event of one thread with those around it, outermost first, and its time less that of
    the events inside."""
    found = []
    open_events: list[tuple[Mapping[str, Any], list[float]]] = []

    def close(until: float) -> None:
        while open_events and open_events[-1][0]["ts"] + open_events[-1][0]["dur"] <= until:
            event, inside = open_events.pop()
            found.append((event, [outer for outer, _ in open_events], event["dur"] - sum(inside)))

    for event in sorted(events, key=lambda e: (e["ts"], -e["dur"])):
        close(event["ts"])
        if open_events:
            open_events[-1][1].append(event["dur"])
        open_events.append((event, []))
    close(float("inf"))
    return found


def group_of(calls: Iterable[Mapping[str, Any]], vocabulary: int) -> str:
    """The group of an operator, given last, after the operators that called it."""
    for event in calls:
        for group, pattern in GROUPS:
            if pattern.search(event["name"]):
                return "output head" if group == "linears" and is_head(event, vocabulary) else group
    return "other operators"


def is_head(event: Mapping[str, Any], vocabulary: int) -> bool:
    """Does a shape of the linear hold the rows of the head, padded or not?"""
    rows = {vocabulary, -(-vocabulary // 64) * 64}
    shapes = event.get("args", {}).get("Input Dims", [])
    return any(isinstance(size, int) and size in rows for shape in shapes for size in shape)


def label(event: Mapping[str, Any]) -> str:
    """The name, and for our ops the shapes of their tensors."""
    shapes = [shape for shape in event.get("args", {}).get("Input Dims", []) if shape]
    if not event["name"].startswith("smoothrot::"):
        return str(event["name"])
    return f"{event['name']} " + " ".join("x".join(map(str, shape)) for shape in shapes)


def show(results: Iterable[Mapping[str, Any]], console: Console) -> None:
    """A table of the groups, and one of the operators of each profile."""
    table = Table(
        "model", "scheme", "group", "ms a step", "share", title="A decode step, one request"
    )
    for r in results:
        total = sum(r["groups_ms"].values())
        for name, ms in r["groups_ms"].items():
            table.add_row(r["model"], r["scheme"], name, f"{ms:.3f}", f"{ms / total:.1%}")
        operators = Table(
            "group", "operator", "calls a step", "ms a step", title=f"{r['model']} {r['scheme']}"
        )
        for o in r["operators"]:
            operators.add_row(o["group"], o["operator"], str(o["calls"]), f"{o['ms']:.3f}")
        console.print(operators)
    console.print(table)


if __name__ == "__main__":
    sys.exit(main())
