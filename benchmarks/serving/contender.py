# SPDX-License-Identifier: Apache-2.0
"""What serve.py times in turn: a server that is up, or llama.cpp, and one batch of requests."""

import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.serving import llama_cpp
from benchmarks.support.commands import options, run_quietly
from benchmarks.support.server import VllmServer, memory


@dataclass(frozen=True)
class Cell:
    """``batch`` requests at once of ``prompt`` tokens each, which are answered with ``output``
    tokens each."""

    batch: int
    prompt: int
    output: int = 32


@dataclass
class Contender:
    """One way to serve a model: a vLLM server that is up and running, or llama.cpp in a process
    for each measurement."""

    scheme: str
    directory: Path
    server: VllmServer | None = None
    startup_s: float = 0.0
    loaded_rss_bytes: int = 0
    peak_rss_bytes: int = 0
    gpu_bytes: int = 0
    """GPU memory in use after the first request beyond what was before the start; right if nobody
    else uses the GPU."""

    def measure(self, cell: Cell, number: int, folder: Path) -> dict[str, float]:
        """``ttft_ms``, ``tpot_ms`` and ``tokens_per_s`` of one round of a cell.

        Raises:
            RuntimeError: it failed.
        """
        if self.server is not None:
            figures = bench(self.server, cell, number, folder)
            self.peak_rss_bytes = memory(self.server.pid, "VmHWM")
            return figures
        found = llama_cpp.measure(self.directory, cell.batch, cell.prompt, cell.output)
        self.startup_s = found.pop("startup_s")
        self.peak_rss_bytes = max(self.peak_rss_bytes, int(found.pop("peak_rss_bytes")))
        self.loaded_rss_bytes = self.peak_rss_bytes
        return found


def bench(server: VllmServer, cell: Cell, number: int, folder: Path) -> dict[str, float]:
    """Medians that ``vllm bench serve`` reports for one batch of random prompts.

    Raises:
        RuntimeError: the command failed, or a request did.
    """
    words = options(
        base_url=server.url,
        model=server.model,
        dataset_name="random",
        random_input_len=cell.prompt,
        random_output_len=cell.output,
        num_prompts=cell.batch,
        max_concurrency=cell.batch,
        seed=number,
        ignore_eos=True,
        temperature=0,
        disable_tqdm=True,
        save_result=True,
        result_dir=folder,
        result_filename="bench.json",
    )
    run_quietly([str(Path(sys.executable).with_name("vllm")), "bench", "serve", *words])
    return figures(json.loads((folder / "bench.json").read_text()), cell)


def figures(measured: Mapping[str, Any], cell: Cell) -> dict[str, float]:
    """What is kept of a result of ``vllm bench serve``.

    Raises:
        RuntimeError: not every request was answered in full.
    """
    answers, tokens = measured["completed"], measured["total_output_tokens"]
    if (answers, tokens) != (cell.batch, cell.batch * cell.output):
        raise RuntimeError(
            f"vllm bench serve: expected {cell.batch} answers of {cell.output} tokens, got"
            f" {answers} answers, {tokens} tokens in all"
        )
    return {
        "ttft_ms": measured["median_ttft_ms"],
        "tpot_ms": measured["median_tpot_ms"],
        "tokens_per_s": measured["output_throughput"],
    }
