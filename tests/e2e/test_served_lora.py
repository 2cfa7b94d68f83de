# SPDX-License-Identifier: Apache-2.0
"""An adapter of the original model, transformed, in a real ``vllm serve``; the untransformed one is
refused there.

The same server shows what docs/hardening.md says about keys, limits and where it listens.
"""

import json
import re
import socket
import subprocess
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from openai import BadRequestError, InternalServerError
from reference_forward import SAFE_MARGIN, Reference
from safetensors.torch import load_file, save_file
from tiny_models import BIN
from transformers import AutoTokenizer

from benchmarks.support.server import HOST, KEY, VllmServer

pytestmark = [pytest.mark.serve, pytest.mark.timeout(900)]

RANK, ALPHA, TOKENS = 4, 8, 8
PROMPTS = [
    f"{start} {number}"
    for start in ("The quick brown fox", "def main():", "Rotation")
    for number in range(4)
]
LINEARS = (
    "self_attn.q_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.up_proj",
    "mlp.down_proj",
)


@pytest.fixture(scope="module")
def base(tiny_converted: Callable[..., Path]) -> Path:
    return tiny_converted("llama", "--activation-bits", "8", "--lm-head-bits", "8")


@pytest.fixture(scope="module")
def adapter(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random adapter of the original model, large enough to change what is said."""
    directory = tmp_path_factory.mktemp("adapter")
    config = json.loads((base / "config.json").read_text())
    sizes = {"down_proj": config["intermediate_size"]}
    outputs = {"up_proj": config["intermediate_size"], "v_proj": config["hidden_size"] // 2}
    torch.manual_seed(0)
    tensors = {}
    for layer in range(config["num_hidden_layers"]):
        for linear in LINEARS:
            leaf, name = (
                linear.rpartition(".")[2],
                f"base_model.model.model.layers.{layer}.{linear}",
            )
            tensors[f"{name}.lora_A.weight"] = (
                torch.randn(RANK, sizes.get(leaf, config["hidden_size"])) * 0.075
            )
            tensors[f"{name}.lora_B.weight"] = (
                torch.randn(outputs.get(leaf, config["hidden_size"]), RANK) * 0.075
            )
    save_file(tensors, directory / "adapter_model.safetensors")
    leaves = [linear.rpartition(".")[2] for linear in LINEARS]
    content = {
        "peft_type": "LORA",
        "r": RANK,
        "lora_alpha": ALPHA,
        "target_modules": leaves,
        "bias": "none",
    }
    (directory / "adapter_config.json").write_text(json.dumps(content))
    return directory


@pytest.fixture(scope="module")
def transformed(base: Path, adapter: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("transformed") / "adapter"
    command = [BIN / "smoothrot-convert", "lora", adapter, out, "--base", base]
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert result.returncode == 0, result.stderr
    return out


@pytest.fixture(scope="module")
def server(
    base: Path, transformed: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[VllmServer]:
    options = [
        "--dtype",
        "float32",
        "--max-model-len",
        "256",
        "--enforce-eager",
        "--enable-lora",
        "--max-lora-rank",
        "8",
    ]
    options += ["--lora-modules", f"adapted={transformed}", "--api-key", KEY]
    environment = {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True"}
    with VllmServer(
        base, tmp_path_factory.mktemp("server") / "server.log", *options, environment=environment
    ) as running:
        yield running


def adapted_reference(base: Path, transformed: Path) -> Reference:
    """The reference forward with the adapter's products beside the linears."""
    reference = Reference(base)
    tensors = load_file(transformed / "adapter_model.safetensors")
    for name in tensors:
        module, _, factor = name.removeprefix("base_model.model.").partition(".lora_")
        if factor == "A.weight":
            a, b = tensors[name], tensors[name.replace("lora_A", "lora_B")]

            def add(
                _: torch.nn.Module,
                inputs: tuple[torch.Tensor],
                output: torch.Tensor,
                a: torch.Tensor = a,
                b: torch.Tensor = b,
            ) -> torch.Tensor:
                return output + inputs[0] @ a.T @ b.T * (ALPHA / RANK)

            reference.model.get_submodule(module).register_forward_hook(add)
    return reference


def tokens_of(server: VllmServer, model: str, prompt: list[int]) -> list[int]:
    completion = server.client.completions.create(
        model=model,
        prompt=prompt,
        max_tokens=TOKENS,
        temperature=0,
        extra_body={"return_token_ids": True, "ignore_eos": True},
    )
    tokens: list[int] = completion.choices[0].token_ids
    return tokens


def test_the_served_adapter_says_what_the_reference_with_it_says(
    server: VllmServer, base: Path, transformed: Path
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(base)
    references = {server.model: Reference(base), "adapted": adapted_reference(base, transformed)}
    compared = dict.fromkeys(references, 0)
    for text in PROMPTS:
        prompt = tokenizer(text).input_ids
        answers = {
            model: reference.greedy(prompt, TOKENS) for model, reference in references.items()
        }
        assert answers["adapted"].tokens != answers[server.model].tokens
        for model, greedy in answers.items():
            if greedy.margin > SAFE_MARGIN:
                assert tokens_of(server, model, prompt) == greedy.tokens
                compared[model] += 1
    assert min(compared.values()) >= 3, "too few prompts without a close call: choose others"


def test_the_original_adapter_is_refused(server: VllmServer, adapter: Path) -> None:
    with pytest.raises((BadRequestError, InternalServerError), match="is of the original model"):
        server.client.post(
            "/load_lora_adapter",
            body={"lora_name": "original", "lora_path": str(adapter)},
            cast_to=object,
        )


HARDENING = (Path(__file__).parents[2] / "docs" / "hardening.md").read_text()
PATHS = re.findall(r"^\| `(/\S+)` \| (GET|POST) \| (refused|open) \|$", HARDENING, re.MULTILINE)
ANSWERS = dict(re.findall(r"^\| (.+) \| (\d{3}) \|$", HARDENING, re.MULTILINE))
LIMITS: dict[str, dict[str, Any] | None] = {
    "a prompt longer than `--max-model-len`": {"prompt": [5] * 300},
    "`max_tokens` beyond what is left of it, below `--max-model-len`": {
        "prompt": [5] * 250,
        "max_tokens": 100,
    },
    "`max_tokens` above `--max-model-len`": {"prompt": [5], "max_tokens": 10_000},
    "more completions than `VLLM_MAX_N_SEQUENCES` (`n`, 16384)": {"prompt": [5], "n": 16385},
    "more prompts than `VLLM_MAX_COMPLETION_PROMPTS` (1024)": {"prompt": [[5]] * 1025},
    "a body that is no JSON": None,
}


def status_of(
    server: VllmServer, path: str, method: str, key: str | None, body: bytes = b"{}"
) -> int:
    headers = {"Content-Type": "application/json"} | (
        {"Authorization": f"Bearer {key}"} if key else {}
    )
    request = urllib.request.Request(
        server.url + path, method=method, headers=headers, data=body if method == "POST" else None
    )
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code


@pytest.mark.parametrize(("path", "method", "said"), PATHS)
def test_the_key_covers_what_the_hardening_notes_say(
    server: VllmServer, path: str, method: str, said: str
) -> None:
    refused = {status_of(server, path, method, key) == 401 for key in (None, "wrong")}
    assert refused == {said == "refused"}
    # An empty body may be refused as such, but the path is there and the key opens it.
    assert status_of(server, path, method, KEY) not in (401, 404, 405)


def test_the_hardening_notes_name_every_limit_that_is_tested() -> None:
    assert len(PATHS) >= 12
    assert LIMITS.keys() == ANSWERS.keys()


@pytest.mark.parametrize("limit", LIMITS)
def test_what_may_cost_much_is_answered_as_the_notes_say(server: VllmServer, limit: str) -> None:
    content = LIMITS[limit]
    body = (
        b"no JSON" if content is None else json.dumps({"model": server.model, **content}).encode()
    )
    assert status_of(server, "/v1/completions", "POST", KEY, body) == int(ANSWERS[limit])


def test_the_loopback_server_listens_nowhere_else(server: VllmServer) -> None:
    with socket.socket() as connection:
        assert connection.connect_ex((HOST, server.port)) == 0
    with socket.socket() as connection:
        assert connection.connect_ex(("127.0.0.2", server.port)) != 0
