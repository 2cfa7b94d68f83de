# SPDX-License-Identifier: Apache-2.0
"""Where a decode step goes: ``vllm bench latency --profile`` of one request, its operators' own
times in groups.

    python -m benchmarks.serving.profile_decode --models SmolLM2-135M --json profile.json

A step is what passes from one model execution to the next. What no operator accounts for, Python
and the engine, is the group "outside operators"; the profiler slows it down most, so shares are for
comparison and speed is what serve.py says.
"""

import argparse
import gzip
import itertools
import json
import re
import statistics
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from benchmarks.serving.models import MODELS, SCHEMES, default_folder, read_config, scheme_model
from benchmarks.support.commands import options, run_quietly
from benchmarks.support.machine import machine, packages
from benchmarks.support.report import save, show_table, terminal
from benchmarks.support.server import small_machine

OUTSIDE = "outside operators"
# The first pattern found in the operator's name, or in the name of one that called it, decides.
GROUPS = (
    ("attention", re.compile(r"attention|reshape_and_cache|kv_cache")),
    (
        "linears",
        re.compile(
            r"smoothrot::|onednn|cpu_gemm_wna16|aten::(linear|mm|addmm|matmul)$|scaled_mm"
            r"|weight_packed_linear"
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
    """Profile each scheme of each model and print a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--models", nargs="+", choices=MODELS, default=["SmolLM2-135M", "Llama-3.2-1B"])
    add("--schemes", nargs="+", choices=SCHEMES, default=["bf16", "w4a8"])
    add("--output-len", type=int, default=32, help="decode steps")
    compiled = "torch.compile as served; without, norms keep their names"
    add("--compiled", action="store_true", help=compiled)
    add("--folder", type=Path, default=default_folder(), help="where models are made and kept")
    add("--json", type=Path, help="file of the result")
    args = parser.parse_args()
    results = []
    for model, scheme in itertools.product(args.models, args.schemes):
        directory = scheme_model(model, scheme, args.folder)
        step = decode_step(
            trace(directory, args.output_len, args.compiled), read_config(directory)["vocab_size"]
        )
        results.append({"model": model, "scheme": scheme, **step})
    asked = {"output_len": args.output_len, "compiled": args.compiled}
    report = {"machine": machine(), "packages": packages(), "options": asked, "results": results}
    save(report, args.json)
    show(results)
    return 0


def trace(directory: Path, output_len: int, compiled: bool) -> list[dict[str, Any]]:
    """Events of the trace that vLLM's torch profiler writes of one request.

    Raises:
        RuntimeError: vLLM failed or wrote no trace of its worker.
    """
    with tempfile.TemporaryDirectory() as folder:
        words = options(
            model=directory,
            dtype="bfloat16",
            max_model_len=256,
            batch_size=1,
            input_len=16,
            output_len=output_len,
            num_iters_warmup=1,
            profile=True,
            disable_detokenize=True,
            enforce_eager=not compiled,
        )
        profiler = {"profiler": "torch", "torch_profiler_dir": folder}
        profiler |= {"torch_profiler_with_stack": "false", "torch_profiler_record_shapes": "true"}
        for name, value in profiler.items():
            words += [f"--profiler-config.{name}", value]
        environment = small_machine(1) | {"VLLM_USE_AOT_COMPILE": "0"}
        environment["TORCHINDUCTOR_CPP_ENABLE_KERNEL_PROFILE"] = "1"
        vllm = str(Path(sys.executable).with_name("vllm"))
        run_quietly([vllm, "bench", "latency", *words], **environment)
        for file in Path(folder).glob("*.json*"):
            content = file.read_bytes()
            content = gzip.decompress(content) if file.suffix == ".gz" else content
            events: list[dict[str, Any]] = json.loads(content)["traceEvents"]
            if any(STEP.match(str(event.get("name"))) for event in events):
                return events
    raise RuntimeError(f"vllm bench latency --profile of {directory}: no trace of a decode step")


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


def show(results: Iterable[Mapping[str, Any]]) -> None:
    """A table of the groups; the operators are in the file."""
    rows = [
        {"model": r["model"], "scheme": r["scheme"], "group": group, "ms": ms}
        | {"share": ms / sum(r["groups_ms"].values())}
        for r in results
        for group, ms in r["groups_ms"].items()
    ]
    columns = {
        "model": lambda r: r["model"],
        "scheme": lambda r: r["scheme"],
        "group": lambda r: r["group"],
        "ms a step": lambda r: f"{r['ms']:.3f}",
        "share": lambda r: f"{r['share']:.1%}",
    }
    show_table(terminal(), "A decode step, one request", columns, rows)


if __name__ == "__main__":
    sys.exit(main())
