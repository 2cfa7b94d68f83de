# SPDX-License-Identifier: Apache-2.0
"""Real ``vllm serve`` processes, started as a user would, against the reference forward of the
same checkpoint."""

import os
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import psutil
import pytest
from reference_forward import SAFE_MARGIN, STARTS, Greedy, Reference
from transformers import AutoTokenizer

from benchmarks.support.server import VllmServer, processes

pytestmark = [pytest.mark.serve, pytest.mark.timeout(900)]

TOKENS = 8
PROMPTS = [f"{start} {number}" for number in range(20) for start in STARTS]
ENOUGH_PROMPTS = 9
"""Of those without a close call."""


@dataclass
class Setup:
    """How one server is started, and the conversion it serves."""

    family: str
    convert: tuple[str, ...]
    flag: bool
    eager: bool
    ranks: int
    stages: int = 1


# Llama, eager, TP=1, W4A8 is the base of test_served_lora.py; other families are in
# test_served_families.py.
SETUPS = {
    # Layers at 8 bits are served among 8-bit activations only: before 4-bit ones a code of theirs
    # on the other side of a tie, which no two orders of float sums agree on, takes many codes with
    # it (0.6 nats in this model).
    "mistral, no flag, compiled, TP=1, W4A4 in groups, each its own clip": Setup(
        "mistral", ("--group-size", "32", "--clip-search"), flag=False, eager=False, ranks=1
    ),
    "qwen2, no flag, eager, TP=2, W4A8 in groups, some layers W8A8": Setup(
        "qwen2",
        (
            "--activation-bits",
            "8",
            "--group-size",
            "32",
            "--keep-8bit",
            "auto:0.4",
            "--lm-head-bits",
            "8",
            "--max-tp",
            "2",
        ),
        flag=False,
        eager=True,
        ranks=2,
    ),
    # vLLM 0.32 for CPUs makes a stage's buffers only as it compiles (docs/compat.md).
    "llama, no flag, compiled, PP=2, W4A8": Setup(
        "llama",
        ("--activation-bits", "8", "--scales", "none"),
        flag=False,
        eager=False,
        ranks=1,
        stages=2,
    ),
    "llama, flag, compiled, TP=2, W4A4, 4-bit head": Setup(
        "llama", ("--lm-head-bits", "4", "--max-tp", "2"), flag=True, eager=False, ranks=2
    ),
    # Each rank has its part of every expert and of the shared one, of another width.
    "qwen2_moe, no flag, compiled, TP=2, W4A8": Setup(
        "qwen2_moe",
        ("--activation-bits", "8", "--rounding", "gptq", "--smooth-norms", "--max-tp", "2"),
        flag=False,
        eager=False,
        ranks=2,
    ),
    "qwen3_moe, no flag, compiled, TP=2, W4A8, some experts W8A8": Setup(
        "qwen3_moe",
        ("--activation-bits", "8", "--keep-8bit", "auto:0.4", "--max-tp", "2"),
        flag=False,
        eager=False,
        ranks=2,
    ),
}


SMOKE = ("mistral", "qwen2")
"""Families of one server that is compiled and one of two ranks; ``make test`` leaves the others
out."""


@dataclass
class Served:
    """A running server and what it must answer: prompt tokens and their reference continuation."""

    server: VllmServer
    expected: list[tuple[list[int], Greedy]]
    workers: int


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(setup, id=name, marks=[] if setup.family in SMOKE else [pytest.mark.slow])
        for name, setup in SETUPS.items()
    ],
)
def served(
    request: pytest.FixtureRequest,
    tiny_converted: Callable[..., Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Served]:
    setup: Setup = request.param
    directory = tiny_converted(setup.family, *setup.convert)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    reference = Reference(directory, setup.ranks)
    answers = (
        (prompt, reference.greedy(prompt, TOKENS))
        for prompt in (tokenizer(prompt).input_ids for prompt in PROMPTS)
    )
    expected = list(
        islice((answer for answer in answers if answer[1].is_determined), ENOUGH_PROMPTS)
    )
    options = ["--dtype", "float32", "--max-model-len", "256"]
    options += ["--quantization", "smoothrot"] if setup.flag else []
    options += ["--enforce-eager"] if setup.eager else []
    log = tmp_path_factory.mktemp("server") / "server.log"
    with VllmServer(
        directory, log, *options, tensor_parallel=setup.ranks, pipeline_parallel=setup.stages
    ) as server:
        yield Served(server, expected, setup.ranks * setup.stages)


def complete(served: Served, prompt: list[int] | list[list[int]], **options: Any) -> Any:
    return served.server.client.completions.create(
        model=served.server.model,
        prompt=prompt,
        temperature=0,
        logprobs=1,
        extra_body={"return_token_ids": True, "ignore_eos": True},
        **{"max_tokens": TOKENS} | options,
    )


def test_greedy_tokens_equal_the_reference(served: Served) -> None:
    assert len(served.expected) >= 3, "too few prompts without a close call: choose others"
    for prompt, greedy in served.expected:
        assert complete(served, prompt).choices[0].token_ids == greedy.tokens


def test_logprobs_equal_the_reference_but_for_rounding_ties(served: Served) -> None:
    differences = []
    for prompt, greedy in served.expected:
        logprobs = complete(served, prompt).choices[0].logprobs.token_logprobs
        differences += [
            abs(got - expected) for got, expected in zip(logprobs, greedy.logprobs, strict=True)
        ]
    assert statistics.median(differences) < 1e-5
    assert max(differences) < SAFE_MARGIN


def test_a_single_worker_runs_in_the_process_of_the_engine(served: Served) -> None:
    names = [psutil.Process(pid).name() for pid in processes(served.server.pid)]
    assert sum(name.startswith("VLLM::Worker") for name in names) == (
        0 if served.workers == 1 else served.workers
    )
    assert any(name.startswith("VLLM::EngineCor") for name in names)
    cores = ", ".join(map(str, sorted(os.sched_getaffinity(0))))
    note = (
        f"worker in the engine's process, {len(os.sched_getaffinity(0))} threads, on cores {cores}"
    )
    assert (note in served.server.log.read_text()) == (served.workers == 1)


def test_streaming_gives_the_same_text(served: Served) -> None:
    prompt, _ = served.expected[0]
    # Enough of them that a busy client does not find all in one piece.
    whole = complete(served, prompt, max_tokens=64).choices[0].text
    stream = complete(served, prompt, max_tokens=64, stream=True)
    pieces = [chunk.choices[0].text for chunk in stream]
    assert len(pieces) > 1
    assert "".join(pieces) == whole


def test_chat_answers_through_the_template(served: Served) -> None:
    messages = [{"role": "user", "content": "Hello"}]
    chat = {
        "model": served.server.model,
        "messages": messages,
        "max_tokens": TOKENS,
        "temperature": 0,
    }
    answer = served.server.client.chat.completions.create(**chat, extra_body={"ignore_eos": True})
    assert answer.usage.completion_tokens == TOKENS
    # <|begin|> is not in the template: role, five letters, <|end|>, and the assistant's turn.
    assert answer.usage.prompt_tokens == 8
    streamed = served.server.client.chat.completions.create(
        **chat, stream=True, extra_body={"ignore_eos": True}
    )
    assert (
        "".join(chunk.choices[0].delta.content or "" for chunk in streamed)
        == answer.choices[0].message.content
    )


def test_many_requests_at_once_get_their_own_answers(served: Served) -> None:
    prompts = [prompt for prompt, _ in served.expected]
    choices = complete(served, prompts).choices
    assert [choice.token_ids for choice in choices] == [
        greedy.tokens for _, greedy in served.expected
    ]
