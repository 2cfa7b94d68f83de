# SPDX-License-Identifier: Apache-2.0
"""One table and one picture: what each way to serve a model costs and gives, accuracy and speed of
the same checkpoint in the same run.

Perplexity is measured on what is served: vLLM is asked for the log-probabilities of the text's
tokens, llama.cpp for its logits. Every server has the same executor.

    python benchmarks/serving/gptq_peer.py MODEL FOLDER/SmolLM2-135M/w4a16 --calib VALID.txt \\
        --group-size 64
    python -m benchmarks.serving.headline --folder FOLDER --text TEST.txt --calib VALID.txt \\
        --json headline.json --svg docs/headline.svg
"""

import argparse
import json
import math
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.serving import llama_cpp, serve
from benchmarks.serving.contender import Contender
from benchmarks.serving.devices import CpuServing
from benchmarks.serving.models import source_model
from benchmarks.support.commands import unwind_on_sigterm
from benchmarks.support.machine import packages
from benchmarks.support.report import Schedule
from benchmarks.support.server import VllmServer

NAMES = {
    "bf16": "16-bit",
    "w8a8": "vLLM W8A8",
    "w4a16": "vLLM W4A16 (GPTQ)",
    "q4_0": "llama.cpp Q4_0",
    "q4_k_m": "llama.cpp Q4_K_M",
    "best_w4a8": "**ours, W4A8 best**",
    "balanced_w4a8": "**ours, W4A8 balanced**",
    "best_w4a4": "**ours, W4A4 best**",
}
"""Rows by contender; ours are set bold."""
EXECUTOR = "smoothrot_vllm.plugin.executor.InEngineExecutor"
TOKEN, BATCH, PROMPT = serve.QUICK_CELLS
"""A request alone, 16 requests, and the first token of 1024."""
WINDOW = 1024
Columns = dict[str, float]


def main() -> int:
    """Measure, then print the table and write the picture."""
    args = parse_arguments()
    unwind_on_sigterm()
    device, schedule = CpuServing(), Schedule(None)
    windows = windows_of(args.text, source_model(args.model, args.folder), args.windows)
    floors = device.floors()
    report = {
        "machine": device.facts(),
        "packages": packages(),
        "options": {"rounds": args.rounds, "executor": args.executor, "windows": len(windows)},
        "floors": floors.record(),
        "missing": {},
        "left_out": schedule.left_out,
        "results": [],
        "judged": {},
    }

    def judge(contender: Contender) -> dict[str, float]:
        found = perplexity(contender, windows)
        return {"perplexity": found, "bytes": weight_bytes(contender.directory)}

    serve.measure_model(args.model, args, report, floors, device, schedule, judge)
    print(markdown(report))
    if args.svg:
        draw(report, args.svg)
    return 1 if report["missing"] else 0


def parse_arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line, as an extension of that of serve.py."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", default="SmolLM2-135M", help="a real model among those of serve.py")
    add("--schemes", nargs="+", choices=NAMES, default=list(NAMES))
    add("--text", type=Path, required=True, help="text of the perplexity")
    add("--calib", required=True, help="calibration text")
    add("--windows", type=int, default=16, help=f"of {WINDOW} tokens of the text")
    add("--rounds", type=int, default=3)
    add("--executor", default=EXECUTOR, help="of every server")
    add("--folder", type=Path, required=True, help="where models are made and kept")
    add("--json", type=Path, required=True)
    add("--svg", type=Path)
    args = parser.parse_args(words)
    if "w4a16" in args.schemes and not (args.folder / args.model / "w4a16").exists():
        parser.error(f"--folder: expected {args.model}/w4a16 in it, which gptq_peer.py makes")
    args.quick, args.eager = True, False
    return args


def windows_of(text: Path, model: Path, count: int) -> list[list[int]]:
    """The first ``count`` windows of a text's tokens."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model, trust_remote_code=False)
    tokens = tokenizer(text.read_text())["input_ids"]
    return [tokens[i * WINDOW : (i + 1) * WINDOW] for i in range(min(count, len(tokens) // WINDOW))]


def perplexity(contender: Contender, windows: Sequence[list[int]]) -> float:
    """Of all tokens but the first of each window."""
    if contender.server is not None:
        total = sum(served_loss(contender.server, window) for window in windows)
    else:
        with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
            json.dump(windows, file)
            file.flush()
            total = llama_cpp.negative_log_likelihood(contender.directory, Path(file.name))
    return round(math.exp(total / sum(len(window) - 1 for window in windows)), 4)


def served_loss(server: VllmServer, window: list[int]) -> float:
    """Negative log-likelihood of a window's tokens as a server gives it."""
    answer = server.client.completions.create(
        model=server.model, prompt=window, max_tokens=1, extra_body={"prompt_logprobs": 0}
    )
    found: list[dict[str, dict[str, float]]] = answer.choices[0].model_extra["prompt_logprobs"]
    pairs = zip(window[1:], found[1:], strict=True)
    return -sum(places[str(token)]["logprob"] for token, places in pairs)


def weight_bytes(directory: Path) -> int:
    """Size of the files that hold weights."""
    files = [*directory.glob("*.safetensors"), *directory.glob("*.gguf")]
    return sum(file.stat().st_size for file in files)


def columns(report: Mapping[str, Any]) -> dict[str, Columns]:
    """The table's figures by contender."""
    cells = {
        (row["scheme"], row["batch"], row["prompt"]): row
        for row in report["results"]
        if row["scheme"] in report["judged"]
    }
    base = report["judged"]["bf16"]["perplexity"]
    found = {}
    for scheme, judged in report["judged"].items():
        token, batch, prompt = (
            cells[scheme, cell.batch, cell.prompt] for cell in (TOKEN, BATCH, PROMPT)
        )
        found[scheme] = {
            "ratio": judged["perplexity"] / base,
            "megabytes": judged["bytes"] / 1e6,
            "tpot_ms": token["tpot_ms"],
            "tokens_per_s": batch["tokens_per_s"],
            "ttft_ms": prompt["ttft_ms"],
            "memory_gb": max(row["peak_rss_bytes"] for row in (token, batch, prompt)) / 1e9,
        }
    return found


def markdown(report: Mapping[str, Any]) -> str:
    """The table as the README has it."""
    lines = [
        "| | perplexity | MB | ms/token | tokens/s | first token, ms | memory, GB |",
        "|---|---|---|---|---|---|---|",
    ]
    for scheme, c in columns(report).items():
        lines.append(
            f"| {NAMES[scheme]} | {c['ratio']:.2f}x | {c['megabytes']:.0f} | {c['tpot_ms']:.1f} |"
            f" {c['tokens_per_s']:.0f} | {c['ttft_ms']:.0f} | {c['memory_gb']:.1f} |"
        )
    return "\n".join(lines)


def draw(report: Mapping[str, Any], svg: Path) -> None:
    """Perplexity against tokens/s, a dot for each contender."""
    import matplotlib as mpl

    mpl.use("svg")
    from matplotlib import pyplot as plt

    # Text as text, and no date: the same figures draw the same file.
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "headline"}):
        figure, axes = plt.subplots(figsize=(7, 4))
        for scheme, c in columns(report).items():
            ours = NAMES[scheme].startswith("**")
            axes.scatter(c["tokens_per_s"], c["ratio"], s=60, color="C3" if ours else "0.5")
            axes.annotate(
                NAMES[scheme].strip("*"),
                (c["tokens_per_s"], c["ratio"]),
                xytext=(6, 6),
                textcoords="offset points",
                fontweight="bold" if ours else "normal",
            )
        axes.set_xlabel("tokens/s, 16 requests (more is better)")
        axes.set_ylabel("perplexity, times that of 16 bits (less is better)")
        axes.margins(0.15)
        axes.spines[["top", "right"]].set_visible(False)
        figure.tight_layout()
        figure.savefig(svg, metadata={"Date": None})
        plt.close(figure)


if __name__ == "__main__":
    sys.exit(main())
