# SPDX-License-Identifier: Apache-2.0
"""The tables of benchmarks/serve.py."""

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table


def show(report: Mapping[str, Any], console: Console) -> None:
    """Speed by cell, each time beside its floor and beside 16 bit; start-up by contender; what
    did not run."""
    console.print(report["machine"], report["packages"], report["floors"], sep="\n")
    speed = Table(
        "model",
        "batch",
        "prompt",
        "scheme",
        "TTFT ms",
        "TPOT ms",
        "of floor",
        "tokens/s",
        "TTFT",
        "TPOT",
        "tokens/s",
    )
    speed.title = "Serving; the last three columns: times as fast as bf16"
    results = report["results"]
    for r in results:
        bf16 = next((b for b in results if b["scheme"] == "bf16" and cell(b) == cell(r)), None)
        speed.add_row(
            r["model"],
            str(r["batch"]),
            str(r["prompt"]),
            r["scheme"],
            f"{r['ttft_ms']:.0f}",
            f"{r['tpot_ms']:.1f}",
            f"{r['tpot_floor_ms'] / r['tpot_ms']:.0%}",
            f"{r['tokens_per_s']:.1f}",
            "-" if bf16 is None else f"{bf16['ttft_ms'] / r['ttft_ms']:.2f}",
            "-" if bf16 is None else f"{bf16['tpot_ms'] / r['tpot_ms']:.2f}",
            "-" if bf16 is None else f"{r['tokens_per_s'] / bf16['tokens_per_s']:.2f}",
        )
    console.print(speed)
    columns = ["model", "scheme", "start-up s", "RSS loaded, MB", "RSS peak, MB"]
    on_gpu = any("gpu_bytes" in r for r in results)
    startup = Table(*columns, *(["GPU, MB"] if on_gpu else []), title="Start-up and memory")
    for model, scheme in dict.fromkeys((r["model"], r["scheme"]) for r in results):
        own = [r for r in results if (r["model"], r["scheme"]) == (model, scheme)]
        loaded, peak = (
            max(r[name] for r in own) / 1e6 for name in ("loaded_rss_bytes", "peak_rss_bytes")
        )
        gpu = [f"{own[-1]['gpu_bytes'] / 1e6:.0f} ({own[-1]['gpu_bytes_of']})"] if on_gpu else []
        startup.add_row(
            model, scheme, f"{own[-1]['startup_s']:.1f}", f"{loaded:.0f}", f"{peak:.0f}", *gpu
        )
    console.print(startup)
    prepack = Table(
        "weight",
        "group size",
        "GB/s on one thread",
        "peak memory / result",
        title="Repacking of weights at start-up",
    )
    for p in report["prepack"]:
        prepack.add_row(
            p["weight"], str(p["group_size"]), f"{p['gb_per_s']:.2f}", f"{p['peak_of_packed']:.2f}"
        )
    if report["prepack"]:
        console.print(prepack)
    for name, reason in report["missing"].items():
        console.print(f"missing: {name}: {reason}", markup=False, highlight=False)
    for case in report["left_out"]:
        console.print(f"left out, time was up: {case}", markup=False, highlight=False)


def cell(result: Mapping[str, Any]) -> tuple[str, int, int, int]:
    """What makes two results comparable."""
    return result["model"], result["batch"], result["prompt"], result["output"]
