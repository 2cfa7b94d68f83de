# SPDX-License-Identifier: Apache-2.0
"""A real model, converted and served with the settings a user gets: bfloat16, torch.compile, no --quantization needed."""

import json
import math
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from serving import VllmServer
from tiny_models import BIN, SHORT_TEXT
from transformers import AutoTokenizer

from smoothrot_offline.model import load_model

pytestmark = [pytest.mark.serve, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def server(smollm2_w4a8: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[VllmServer]:
    log = tmp_path_factory.mktemp("server") / "server.log"
    with VllmServer(smollm2_w4a8, log, "--quantization", "smoothrot", "--max-model-len", "1024") as server:
        yield server


@pytest.fixture(scope="module")
def text_tokens(smollm2_w4a8: Path) -> list[int]:
    return AutoTokenizer.from_pretrained(smollm2_w4a8)(SHORT_TEXT.read_text()).input_ids


@pytest.fixture(scope="module")
def served_logprobs(server: VllmServer, text_tokens: list[int]) -> list[float]:
    """Log-probability of each token of the text after the first, in nats."""
    answer = server.client.completions.create(
        model=server.model, prompt=text_tokens, max_tokens=1, temperature=0, extra_body={"prompt_logprobs": 0}
    )
    first, *rest = answer.choices[0].prompt_logprobs
    assert first is None
    return [entry[str(token)]["logprob"] for token, entry in zip(text_tokens[1:], rest, strict=True)]


def test_it_knows_the_capital_of_france(server: VllmServer) -> None:
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    answer = server.client.chat.completions.create(model=server.model, messages=messages, max_tokens=32, temperature=0)
    assert "Paris" in answer.choices[0].message.content


def test_served_perplexity_is_that_of_eval(smollm2_w4a8: Path, served_logprobs: list[float]) -> None:
    command = [BIN / "smoothrot-convert", "eval", smollm2_w4a8, "--text", SHORT_TEXT, "--seqlen", "1024", "--json"]
    result = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert result["tokens"] == len(served_logprobs)
    perplexity = math.exp(-sum(served_logprobs) / len(served_logprobs))
    assert perplexity == pytest.approx(result["perplexity"], rel=0.01)


@torch.inference_mode()
def test_bfloat16_logprobs_stay_near_the_float32_forward(
    smollm2_w4a8: Path, served_logprobs: list[float], text_tokens: list[int]
) -> None:
    logits = load_model(smollm2_w4a8, torch.float32)(torch.tensor([text_tokens])).logits[0, :-1]
    exact = logits.log_softmax(-1).gather(1, torch.tensor(text_tokens[1:])[:, None])[:, 0]
    difference = (torch.tensor(served_logprobs) - exact).abs()
    # bfloat16 keeps 8 bits of each of the 60 residual additions and of the logits, which here are up to 25 nats.
    assert difference.mean() < 0.05
    assert difference.max() < 0.5
