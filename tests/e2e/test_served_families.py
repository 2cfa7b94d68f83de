# SPDX-License-Identifier: Apache-2.0
"""Families beside those of ``test_served_model.py``: vLLM's engine, in one process for all of
them, against the reference."""

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from reference_forward import SAFE_MARGIN, STARTS, Reference
from transformers import AutoTokenizer

pytestmark = [pytest.mark.serve, pytest.mark.timeout(900)]

# 8-bit activations: what a rounding tie is worth then leaves enough prompts to compare, as Gemma 3
# does with 4 bits.
CONVERSIONS: dict[str, tuple[str, ...]] = {
    "qwen3": ("--activation-bits", "8"),
    # Fused linears, rounded for what they read.
    "phi3": ("--activation-bits", "8", "--group-size", "32", "--rounding", "gptq"),
    "gemma2": ("--activation-bits", "8"),
    "gemma3": (),
    # Layers given more than the residual stream, keys and values shared; some layers of 8 bits.
    "gemma4": ("--activation-bits", "8", "--keep-8bit", "auto:0.4"),
    # Keys as values, in the same op as queries.
    "gemma4_large": ("--activation-bits", "8", "--keep-8bit", "auto:0.6", "--rounding", "gptq"),
    # vLLM runs transformers' own model code.
    "smollm3": ("--activation-bits", "8"),
    "granite": ("--activation-bits", "8", "--lm-head-bits", "8"),
    "ernie4_5": ("--activation-bits", "8"),
    # R1 left to the server.
    "ministral3": ("--activation-bits", "8", "--residual", "online"),
    # A linear that is stored fused, in a class that lists its parts; some layers of 8 bits.
    "glm4": ("--activation-bits", "8", "--keep-8bit", "auto:0.4"),
    "glm": ("--activation-bits", "8"),
    "seed_oss": ("--activation-bits", "8"),
    # Linears that read the residual stream itself.
    "olmo2": ("--activation-bits", "8"),
    "olmo3": ("--activation-bits", "8"),
    "exaone4": ("--activation-bits", "8"),
    "hunyuan_v1_dense": ("--activation-bits", "8"),
    # Experts: four per channel, and eight in groups.
    "mixtral": ("--activation-bits", "8"),
    "olmoe": ("--activation-bits", "8"),
    # Beside them one of another width, that every token goes through.
    "qwen2_moe": (
        "--activation-bits",
        "8",
        "--group-size",
        "32",
        "--rounding",
        "gptq",
        "--smooth-norms",
    ),
    "qwen3_moe": ("--activation-bits", "8", "--group-size", "32"),
    # Behind a layer without experts; groups of them.
    "glm4_moe": ("--activation-bits", "8", "--rounding", "gptq", "--hessian", "model"),
    # Attention by latent states, in V3 with a fused linear that makes two of them.
    "deepseek_v2": ("--activation-bits", "8", "--lm-head-bits", "8"),
    "deepseek_v3": ("--activation-bits", "8", "--rounding", "gptq", "--hessian", "model"),
    # With biases and limits, which no scale passes through.
    "gpt_oss": (
        *("--activation-bits", "8", "--scales", "none"),
        *("--group-size", "32", "--rounding", "gptq"),
    ),
}
# Whose MLPs compute their activation in the op of down_proj; Gemma's is GELU, experts that tokens
# are routed to have an op of their own.
FUSED = {
    "qwen3",
    "phi3",
    "smollm3",
    "granite",
    "ernie4_5",
    "ministral3",
    "glm4",
    "seed_oss",
    "hunyuan_v1_dense",
    "olmo2",
    "olmo3",
    "exaone4",
    "qwen2_moe",
    "glm4_moe",
    "deepseek_v2",
    "deepseek_v3",
}
PROMPTS = [f"{start} {number}" for start in STARTS for number in range(6)]
ENGINE = Path(__file__).with_name("serve_in_process.py")
ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
}


@pytest.fixture(scope="module")
def prompts(tiny_converted: Callable[..., Path]) -> dict[str, list[list[int]]]:
    """Prompt tokens by converted directory."""
    directories = [tiny_converted(family, *options) for family, options in CONVERSIONS.items()]
    return {
        str(directory): [
            AutoTokenizer.from_pretrained(directory)(prompt).input_ids for prompt in PROMPTS
        ]
        for directory in directories
    }


@pytest.fixture(scope="module")
def answers(
    prompts: dict[str, list[list[int]]], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, dict[str, Any]]:
    """What the engine makes of the prompts, by directory: see the engine's script."""
    out = tmp_path_factory.mktemp("answers") / "answers.json"
    command = [sys.executable, str(ENGINE), str(out)]
    result = subprocess.run(
        command,
        input=json.dumps(prompts),
        env=os.environ | ENVIRONMENT,
        capture_output=True,
        text=True,
        check=False,
        timeout=840,
    )
    assert out.exists(), result.stdout[-2000:] + result.stderr[-4000:]
    found: dict[str, dict[str, Any]] = json.loads(out.read_text())
    return found


@pytest.mark.parametrize("family", CONVERSIONS)
def test_greedy_tokens_and_logprobs_equal_the_reference(
    tiny_converted: Callable[..., Path],
    prompts: dict[str, list[list[int]]],
    answers: dict[str, dict[str, Any]],
    family: str,
) -> None:
    directory = tiny_converted(family, *CONVERSIONS[family])
    reference = Reference(directory)
    differences = []
    for prompt, answer in zip(
        prompts[str(directory)], answers[str(directory)]["continuations"], strict=True
    ):
        expected = reference.greedy(prompt, len(answer["tokens"]))
        if expected.is_determined:
            assert answer["tokens"] == expected.tokens
            differences += [
                abs(got - want)
                for got, want in zip(answer["logprobs"], expected.logprobs, strict=True)
            ]
    assert len(differences) >= 3 * len(answer["tokens"]), (
        "too few prompts without a close call: choose others"
    )
    assert statistics.median(differences) < 1e-5
    assert max(differences) < SAFE_MARGIN


@pytest.mark.parametrize("family", CONVERSIONS)
def test_the_activation_runs_in_the_op_of_down_proj(
    tiny_converted: Callable[..., Path], answers: dict[str, dict[str, Any]], family: str
) -> None:
    directory = tiny_converted(family, *CONVERSIONS[family])
    layers = json.loads((directory / "config.json").read_text())["num_hidden_layers"]
    calls = answers[str(directory)]["silu_mul_linear_calls"]
    # Each step of the model is a call in each layer, and the first token of a prompt and its three
    # others are steps.
    assert calls % layers == 0
    assert calls >= 4 * layers if family in FUSED else calls == 0
