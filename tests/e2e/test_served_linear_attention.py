# SPDX-License-Identifier: Apache-2.0
"""Layers of linear attention in vLLM's engine, whose kernels for them take bfloat16 only on a CPU:
near the float32 reference, as the 16-bit source is."""

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
from reference_forward import STARTS
from test_served_families import ENVIRONMENT
from transformers import AutoTokenizer

from smoothrot_offline.report.model import load_model

pytestmark = [pytest.mark.serve, pytest.mark.timeout(900)]

# Rounded for what they read, layers of both kinds.
GROUPS = ("--activation-bits", "8", "--group-size", "32", "--rounding", "gptq")
CONVERSIONS: dict[str, dict[str, tuple[str, ...]]] = {
    "qwen3_5": {
        "per channel": ("--activation-bits", "8"),
        "in groups": GROUPS,
        # But for the small 16-bit projections, which read what is not rotated.
        "R1 online": (*GROUPS, "--residual", "online"),
    },
    # Experts, and one beside them that every token goes through.
    "qwen3_5_moe": {"in groups": GROUPS},
    # Projections that are stored fused.
    "qwen3_next": {"in groups": GROUPS},
}
NAMES = [
    f"{family}, {name}" for family, options in CONVERSIONS.items() for name in ("source", *options)
]
PROMPTS = [f"{start} {number}" for start in STARTS for number in range(2)]
ENGINE = Path(__file__).with_name("engine_in_process.py")
STAND_INS = Path(__file__).with_name("stand_ins")


@pytest.fixture(scope="module")
def models(tiny_converted: Callable[..., Path]) -> dict[str, Path]:
    found = {}
    for family, conversions in CONVERSIONS.items():
        for name, options in conversions.items():
            converted = tiny_converted(family, *options)
            found[f"{family}, {name}"] = converted
            found[f"{family}, source"] = converted.parent / "source"
    return found


@pytest.fixture(scope="module")
def prompts(models: dict[str, Path]) -> list[list[int]]:
    tokenizer = AutoTokenizer.from_pretrained(models[NAMES[0]])
    return [tokenizer(prompt).input_ids for prompt in PROMPTS]


@pytest.fixture(scope="module")
def answers(
    models: dict[str, Path], prompts: list[list[int]], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, dict[str, Any]]:
    """The first token of each continuation and the distribution of the second, by model."""
    out = tmp_path_factory.mktemp("answers") / "answers.json"
    given = {
        name: {
            "model": str(directory),
            "use": "first_logprobs",
            "arguments": {"dtype": "bfloat16", "max_logprobs": -1},
            "data": prompts,
        }
        for name, directory in models.items()
    }
    path = os.pathsep.join(filter(None, (str(STAND_INS), os.environ.get("PYTHONPATH"))))
    result = subprocess.run(
        [sys.executable, str(ENGINE), str(out)],
        input=json.dumps(given),
        env=os.environ | ENVIRONMENT | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    assert out.exists(), result.stdout[-2000:] + result.stderr[-4000:]
    found: dict[str, dict[str, Any]] = json.loads(out.read_text())
    return found


@pytest.mark.parametrize("name", NAMES)
def test_distributions_are_near_the_reference(
    models: dict[str, Path],
    prompts: list[list[int]],
    answers: dict[str, dict[str, Any]],
    name: str,
) -> None:
    assert "found" in answers[name], answers[name]["error"]
    model = load_model(models[name], torch.float32, kernels="reference")
    expected, distances = [], []
    for prompt, step in zip(prompts, answers[name]["found"], strict=True):
        with torch.inference_mode():
            logits = model(torch.tensor([[*prompt, step["first"]]])).logits[0, -2:]
        first, second = logits.softmax(-1)
        assert first.max() - first[step["first"]] < 0.05
        distances.append(distance(second, torch.tensor(step["logprobs"]).exp()))
        expected.append(second)
    # In a mixture bfloat16 sends a token here and there to another expert.
    assert statistics.median(distances) < 0.1
    assert max(distances) < (0.3 if "_moe" in name or "_next" in name else 0.1)
    assert min(distance(*pair) for pair in combinations(expected, 2)) > 0.3


def distance(one: torch.Tensor, other: torch.Tensor) -> float:
    """Total variation of two distributions, 0 to 1."""
    return float((one - other).abs().sum() / 2)
