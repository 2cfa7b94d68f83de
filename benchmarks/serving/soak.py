# SPDX-License-Identifier: Apache-2.0
"""Mixed load on a served model for minutes or hours: no 5xx, no wrong greedy answer, no growing
memory.

    python -m benchmarks.serving.soak DIR --minutes 30 --concurrency 32 --json soak.json

Serves DIR with ``vllm serve`` in float32 and sends completions and chats, streamed and whole, long
prompts, requests given up half-way and requests that must be refused. Greedy answers are compared
with those of the plain-torch forward of DIR, up to their first close call. The exit code is 1 if
any check fails.
"""

import argparse
import asyncio
import json
import random
import statistics
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import openai
import torch
from transformers import AutoTokenizer

from benchmarks.support.commands import options
from benchmarks.support.machine import machine, packages
from benchmarks.support.report import save
from benchmarks.support.server import VllmServer, memory
from smoothrot_offline.report.model import load_model

TOKENS = 16
LEAST_TOKENS = 4
"""Of an answer that is compared."""
NOISE = 1e-6
"""Relative, on the embedded tokens: as much as another order of float32 sums makes."""
NOISE_DRAWS = 8
SAFETY = 2.0
"""A call is close if the lead over the runner-up is at most this many times the largest change
that the noise makes to it or to an earlier lead of the answer. Quantizing carries noise far: an
input beside the middle of two codes gets the other one."""
SAMPLE_SECONDS = 5.0
MOST_GROWTH = 1.05
"""Of resident memory from the second quarter of the run to its last."""
STARTS = (
    "The capital of France is",
    "def fibonacci(n):",
    "Water boils at",
    "Once upon a time",
    "The three primary colors are",
    "1 2 3 4",
)
SHARES = {"completion": 30, "stream": 20, "chat": 15, "long": 10, "abort": 15, "bad": 10}
"""How often each kind of request is drawn."""


@dataclass
class Tally:
    """What happened so far: requests by kind and outcome, failures in words, seconds by kind."""

    outcomes: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)
    first_token: list[float] = field(default_factory=list)
    per_token: list[float] = field(default_factory=list)
    memory: list[int] = field(default_factory=list)


def main() -> None:
    """Run the load and report."""
    arguments = parse_arguments()
    answers = reference_answers(arguments.model, arguments.prompts)
    print(
        f"{len(answers)} prompts whose answers begin with {min(map(len, answers.values()))} tokens"
        " or more without a close call",
        file=sys.stderr,
    )
    with tempfile.TemporaryDirectory() as work:
        log = Path(work) / "server.log"
        words = options(
            dtype="float32",
            max_model_len=arguments.max_model_len,
            max_num_seqs=arguments.concurrency,
            # A seeded request whose prompt is split ends vLLM 0.32 for CPUs (docs/hardening.md).
            no_enable_chunked_prefill=True,
            enforce_eager=arguments.enforce_eager,
        )
        with VllmServer(arguments.model, log, *words) as server:
            tally = asyncio.run(soak(server, answers, arguments))
    result = summary(tally, arguments)
    save(result, arguments.json)
    print(json.dumps(result, indent=1))
    sys.exit(1 if result["failures"] else 0)


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("model", type=Path, help="converted directory")
    add("--minutes", type=float, default=30.0)
    add("--concurrency", type=int, default=32)
    add("--prompts", type=int, default=48, help="different prompts to draw from")
    add("--max-model-len", type=int, default=1024)
    add("--enforce-eager", action="store_true", help="without compiling the model's graph")
    add("--seed", type=int, default=0)
    add("--json", type=Path, help="file of the result")
    return parser.parse_args()


@torch.inference_mode()
def reference_answers(directory: Path, count: int) -> dict[tuple[int, ...], list[int]]:
    """Greedy continuations by prompt, each as far as no call is close."""
    model, tokenizer = (
        load_model(directory, torch.float32),
        AutoTokenizer.from_pretrained(directory, trust_remote_code=False),
    )
    noise = torch.Generator().manual_seed(0)
    answers, largest_change = {}, 0.0
    for number in range(count):
        prompt = tokenizer(f"{number}. {STARTS[number % len(STARTS)]}").input_ids
        tokens = list(prompt)
        for _ in range(TOKENS):
            tokens.append(int(model(torch.tensor([tokens])).logits[0, -1].argmax()))
        embedded = model.get_input_embeddings()(torch.tensor([tokens[:-1]]))
        draws = NOISE * torch.randn(NOISE_DRAWS, *embedded.shape[1:], generator=noise)
        leads = _leads(
            model,
            embedded * (1 + torch.cat([torch.zeros_like(draws[:1]), draws])),
            tokens[len(prompt) :],
        )
        change = (leads[1:] - leads[0]).abs().amax(0).cummax(0).values
        largest_change = max(largest_change, float(change.max()))
        safe = int((leads[0] > SAFETY * change).long().cumprod(0).sum())
        if safe >= LEAST_TOKENS:
            answers[tuple(prompt)] = tokens[len(prompt) : len(prompt) + safe]
    print(f"noise of {NOISE} changes a lead by up to {largest_change:.3f} nats", file=sys.stderr)
    if not answers:
        sys.exit(
            f"error: {directory}: every one of {count} prompts has an early close call; raise"
            " --prompts"
        )
    return answers


def _leads(model: torch.nn.Module, embedded: torch.Tensor, answer: list[int]) -> torch.Tensor:
    """Lead of each token of the answer over the best other one, in nats: ``(sequences,
    tokens)``."""
    logits = model(inputs_embeds=embedded).logits[:, -len(answer) :]
    chosen = torch.tensor(answer)[None, :, None].expand(len(logits), -1, 1)
    others = logits.scatter(2, chosen, float("-inf"))
    return logits.gather(2, chosen)[..., 0] - others.amax(2)


async def soak(
    server: VllmServer, answers: dict[tuple[int, ...], list[int]], arguments: argparse.Namespace
) -> Tally:
    """Send requests from ``concurrency`` clients until the time is over."""
    tally, end = Tally(), time.monotonic() + 60 * arguments.minutes
    async with openai.AsyncOpenAI(
        base_url=server.client.base_url, api_key="none", max_retries=0, timeout=600
    ) as client:
        session = Session(client, server.model, answers, arguments.max_model_len, tally)
        clients = [
            session.client(random.Random(f"{arguments.seed}/{i}"), end)
            for i in range(arguments.concurrency)
        ]
        await asyncio.gather(*clients, sample_memory(server.pid, tally, end))
    return tally


async def sample_memory(pid: int, tally: Tally, end: float) -> None:
    """Resident bytes of the server and its children, again and again."""
    while time.monotonic() < end:
        tally.memory.append(memory(pid, "VmRSS"))
        await asyncio.sleep(SAMPLE_SECONDS)


@dataclass
class Session:
    """The kinds of requests, by method name; each raises nothing and counts what it saw."""

    api: openai.AsyncOpenAI
    model: str
    answers: dict[tuple[int, ...], list[int]]
    max_model_len: int
    tally: Tally

    async def client(self, draw: random.Random, end: float) -> None:
        """One client: a request after the other."""
        kinds, shares = list(SHARES), list(SHARES.values())
        while time.monotonic() < end:
            kind = draw.choices(kinds, shares)[0]
            try:
                await getattr(self, kind)(draw)
            except openai.APIError as error:
                self.fail(kind, f"{type(error).__name__}: {error}")

    def fail(self, kind: str, reason: str) -> None:
        """Count a failed check."""
        self.tally.outcomes[f"{kind} failed"] += 1
        self.tally.failures.append(f"{kind}: {reason}")

    def check(self, kind: str, got: list[int], expected: list[int]) -> None:
        """Count a greedy answer of which the first tokens are known, right or wrong."""
        if len(got) == TOKENS and got[: len(expected)] == expected:
            self.tally.outcomes[f"{kind} right"] += 1
        else:
            self.fail(kind, f"expected {TOKENS} tokens that begin with {expected}, got {got}")

    def greedy(self, prompt: list[int]) -> dict[str, Any]:
        """Options of a greedy completion that says its tokens."""
        extra = {"return_token_ids": True, "ignore_eos": True}
        return {
            "model": self.model,
            "prompt": prompt,
            "max_tokens": TOKENS,
            "temperature": 0,
            "extra_body": extra,
        }

    async def completion(self, draw: random.Random) -> None:
        """A greedy completion in one piece."""
        prompt, expected = draw.choice(list(self.answers.items()))
        answer = await self.api.completions.create(**self.greedy(list(prompt)))
        self.check("completion", answer.choices[0].token_ids, expected)

    async def stream(self, draw: random.Random) -> None:
        """A greedy completion, streamed and timed."""
        prompt, expected = draw.choice(list(self.answers.items()))
        started, times = time.perf_counter(), []
        tokens: list[int] = []
        async for chunk in await self.api.completions.create(
            **self.greedy(list(prompt)), stream=True
        ):
            times.append(time.perf_counter())
            tokens += chunk.choices[0].token_ids or []
        self.check("stream", tokens, expected)
        self.tally.first_token.append(times[0] - started)
        self.tally.per_token.append((times[-1] - times[0]) / (TOKENS - 1))

    async def chat(self, draw: random.Random) -> None:
        """A sampled chat."""
        messages: Any = [
            {"role": "user", "content": f"Tell me about the number {draw.randrange(1000)}."}
        ]
        answer = await self.api.chat.completions.create(
            model=self.model,
            messages=messages,
            max_tokens=TOKENS,
            temperature=1.0,
            seed=draw.randrange(1 << 30),
        )
        usage = answer.usage
        if usage is None or not 0 < usage.completion_tokens <= TOKENS:
            self.fail("chat", f"expected 1 to {TOKENS} tokens, got {usage}")
        else:
            self.tally.outcomes["chat right"] += 1

    async def long(self, draw: random.Random) -> None:
        """A prompt that nearly fills the context: its end decides the answer, its tokens are
        random."""
        prompt = [
            draw.choice(draw.choice(list(self.answers))) for _ in range(self.max_model_len - TOKENS)
        ]
        answer = await self.api.completions.create(**self.greedy(prompt))
        if len(answer.choices[0].token_ids) == TOKENS:
            self.tally.outcomes["long right"] += 1
        else:
            self.fail("long", f"expected {TOKENS} tokens, got {len(answer.choices[0].token_ids)}")

    async def abort(self, draw: random.Random) -> None:
        """A stream that the client leaves after a few tokens."""
        prompt, _ = draw.choice(list(self.answers.items()))
        request = self.greedy(list(prompt)) | {"max_tokens": 256}
        stream = await self.api.completions.create(**request, stream=True)
        seen = 0
        async for _ in stream:
            seen += 1
            if seen == 3:
                break
        await stream.close()
        self.tally.outcomes["abort right"] += 1

    async def bad(self, draw: random.Random) -> None:
        """A request that has to be refused as the client's fault."""
        prompt = list(next(iter(self.answers)))
        change: dict[str, Any] = draw.choice(
            [
                {"prompt": prompt * self.max_model_len},
                {"max_tokens": -1},
                {"model": "no-such-model"},
                {"temperature": -3.0},
                {"n": 0},
            ]
        )
        try:
            await self.api.completions.create(**self.greedy(prompt) | change)
        except openai.APIStatusError as error:
            if 400 <= error.status_code < 500:
                self.tally.outcomes["bad right"] += 1
            else:
                self.fail(
                    "bad", f"{list(change)}: expected a 4xx, got {error.status_code}: {error}"
                )
        else:
            self.fail("bad", f"{list(change)}: expected a refusal, got an answer")


def summary(tally: Tally, arguments: argparse.Namespace) -> dict[str, Any]:
    """The result as JSON: counts, latencies, memory, and every failure."""
    quarter = max(1, len(tally.memory) // 4)
    before = statistics.median(tally.memory[quarter : 2 * quarter] or tally.memory)
    after = statistics.median(tally.memory[-quarter:])
    failures = list(tally.failures)
    if after > MOST_GROWTH * before:
        failures.append(f"memory: median resident bytes grew from {before:.0f} to {after:.0f}")
    return {
        "minutes": arguments.minutes,
        "concurrency": arguments.concurrency,
        "max_model_len": arguments.max_model_len,
        "enforce_eager": arguments.enforce_eager,
        "model": json.loads((arguments.model / "config.json").read_text()),
        "device": machine(),
        "packages": packages(),
        "outcomes": dict(sorted(tally.outcomes.items())),
        "median_ttft_seconds": statistics.median(tally.first_token) if tally.first_token else None,
        "median_tpot_seconds": statistics.median(tally.per_token) if tally.per_token else None,
        "resident_bytes": {"second_quarter": before, "last_quarter": after},
        "failures": failures,
    }


if __name__ == "__main__":
    main()
