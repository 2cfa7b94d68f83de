# SPDX-License-Identifier: Apache-2.0
"""A real model, converted and served with the settings a user gets: bfloat16, torch.compile, no
--quantization needed."""

import json
import math
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tiny_models import BIN, SHORT_TEXT
from transformers import AutoTokenizer

from benchmarks.support.server import VllmServer
from smoothrot_offline.report.model import load_model

pytestmark = [pytest.mark.serve, pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def server(smollm2_w4a8: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[VllmServer]:
    log = tmp_path_factory.mktemp("server") / "server.log"
    options = ["--quantization", "smoothrot", "--max-model-len", "1024", "--api-server-count", "2"]
    options += ["--enable-auto-tool-choice", "--tool-call-parser", "hermes"]
    with VllmServer(smollm2_w4a8, log, *options) as server:
        yield server


@pytest.fixture(scope="module")
def text_tokens(smollm2_w4a8: Path) -> list[int]:
    return AutoTokenizer.from_pretrained(smollm2_w4a8)(SHORT_TEXT.read_text()).input_ids


@pytest.fixture(scope="module")
def served_logprobs(server: VllmServer, text_tokens: list[int]) -> list[float]:
    """Log-probability of each token of the text after the first, in nats."""
    answer = server.client.completions.create(
        model=server.model,
        prompt=text_tokens,
        max_tokens=1,
        temperature=0,
        extra_body={"prompt_logprobs": 0},
    )
    first, *rest = answer.choices[0].prompt_logprobs
    assert first is None
    return [
        entry[str(token)]["logprob"] for token, entry in zip(text_tokens[1:], rest, strict=True)
    ]


def test_it_knows_the_capital_of_france(server: VllmServer) -> None:
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    answer = server.client.chat.completions.create(
        model=server.model, messages=messages, max_tokens=32, temperature=0
    )
    assert "Paris" in answer.choices[0].message.content


def test_it_calls_a_tool_as_the_source_does(server: VllmServer) -> None:
    """The source's arguments are a JSON text of the city too: vLLM 0.32 does not hold them to
    the schema's object."""
    parameters = {
        "type": "object",
        "properties": {"city": {"type": "string", "maxLength": 20}},
        "required": ["city"],
    }
    answer = server.client.chat.completions.create(
        model=server.model,
        messages=[{"role": "user", "content": "What is the weather in Paris?"}],
        tools=[{"type": "function", "function": {"name": "weather", "parameters": parameters}}],
        tool_choice={"type": "function", "function": {"name": "weather"}},
        max_tokens=64,
        temperature=0,
    )
    (call,) = answer.choices[0].message.tool_calls
    assert call.function.name == "weather"
    assert json.loads(call.function.arguments).lower() == "paris"


def test_both_api_servers_answer_alike(server: VllmServer) -> None:
    """Each connection is one of theirs; twelve all with the same one of two is a chance of 1 in
    2000."""
    answers = set()
    for _ in range(12):
        with server.client as client:
            answer = client.completions.create(
                model=server.model, prompt="The sea is", max_tokens=8, temperature=0
            )
        answers.add(answer.choices[0].text)
    assert len(answers) == 1
    assert server.log.read_text().count("Started server process") == 2


def test_served_perplexity_is_that_of_eval(
    smollm2_w4a8: Path, served_logprobs: list[float]
) -> None:
    command = [
        BIN / "smoothrot-convert",
        "eval",
        smollm2_w4a8,
        "--text",
        SHORT_TEXT,
        "--seqlen",
        "1024",
        "--json",
    ]
    result = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert result["tokens"] == len(served_logprobs)
    perplexity = math.exp(-sum(served_logprobs) / len(served_logprobs))
    assert perplexity == pytest.approx(result["perplexity"], rel=0.01)


def test_served_bfloat16_is_as_near_the_float32_forward_as_torch_bfloat16(
    smollm2_w4a8: Path, served_logprobs: list[float], text_tokens: list[int]
) -> None:
    """At most twice the error of the same forward in torch: vLLM's own ops round elsewhere, but
    not more."""
    exact = forward_logprobs(smollm2_w4a8, torch.float32, text_tokens)
    torch_error = (forward_logprobs(smollm2_w4a8, torch.bfloat16, text_tokens) - exact).abs()
    served_error = (torch.tensor(served_logprobs) - exact).abs()
    assert served_error.mean() <= 2 * torch_error.mean()
    assert served_error.max() <= 2 * torch_error.max()
    # And small enough in itself to tell a wrong layer from a rounded one.
    assert served_error.mean() < 0.1


@torch.inference_mode()
def forward_logprobs(directory: Path, dtype: torch.dtype, tokens: list[int]) -> torch.Tensor:
    logits = load_model(directory, dtype)(torch.tensor([tokens])).logits[0, :-1]
    return logits.float().log_softmax(-1).gather(1, torch.tensor(tokens[1:])[:, None])[:, 0]
