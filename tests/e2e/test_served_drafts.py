# SPDX-License-Identifier: Apache-2.0
"""EAGLE heads in vLLM's engine: as many of their tokens are kept on a converted model as on the
16-bit one that they were trained on, and none changes an answer.

With R1 online the head is the original one, with R1 folded a transformed one.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from forked import COMMAND, run_forked
from test_served_families import ENVIRONMENT
from tiny_heads import EagleHead, Language, save_head, save_model, train_head, trained_model
from tiny_models import byte_tokenizer, convert

pytestmark = [pytest.mark.serve, pytest.mark.timeout(1500)]

ENGINE = Path(__file__).with_name("engine_in_process.py")
CALIBRATION = ("--calib-samples", "32", "--calib-seqlen", "64")
OPTIONS = (*CALIBRATION, "--activation-bits", "8", "--lm-head-bits", "8")
CONVERSIONS = {
    "W8A8": ("--weight-bits", "8"),
    "W4A8": ("--weight-bits", "4", "--group-size", "32", "--rounding", "gptq"),
}
CONVERTED = [f"{bits} {residual}" for bits in CONVERSIONS for residual in ("online", "folded")]
DRAFTED, PROMPTS, PROMPT, TOKENS = 3, 96, 24, 48


@pytest.fixture(scope="module")
def language() -> Language:
    return Language.made_up()


@pytest.fixture(scope="module")
def directories(language: Language, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The source, its conversions and heads."""
    folder = tmp_path_factory.mktemp("drafts")
    model = trained_model(language, "llama", steps=400)
    torch.manual_seed(1)
    heads = {"head": EagleHead(model.config), "untrained": EagleHead(model.config)}
    train_head(heads["head"], model, language, steps=150)
    found = {name: save_head(head, model.config, folder / name) for name, head in heads.items()} | {
        "source": save_model(model, folder / "source")
    }
    text = folder / "text.txt"
    text.write_text("\n".join(byte_tokenizer().batch_decode(language.texts(64, 256))))
    for name in CONVERTED:
        bits, residual = name.split()
        options = (*OPTIONS, "--calib", str(text), *CONVERSIONS[bits], "--residual", residual)
        found[name] = convert(found["source"], folder / name.replace(" ", "-"), *options)
        found[f"{name} head"] = found["head"]
        if residual == "folded":
            found[f"{name} head"] = transformed(found["head"], folder / f"{bits}-head", found[name])
    return found


def transformed(head: Path, out: Path, base: Path) -> Path:
    """``smoothrot-convert draft`` as a user types it."""
    result = run_forked(COMMAND, "draft", head, out, "--base", base)
    assert result.returncode == 0, result.stderr
    return out


@pytest.fixture(scope="module")
def results(
    directories: dict[str, Path], language: Language, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, dict[str, Any]]:
    """What came of each engine: see its script."""
    asked = {"prompts": language.texts(PROMPTS, PROMPT).tolist(), "tokens": TOKENS}
    cases: dict[str, tuple[str, str | None]] = {
        name: (name, None) for name in ("source", *CONVERTED)
    }
    cases |= {f"{name}, drafted": (name, f"{name} head") for name in CONVERTED}
    cases["source, drafted"] = ("source", "head")
    cases["untrained head"] = ("source", "untrained")
    cases["head of a converted model"] = ("source", "W8A8 folded head")
    cases["original head"] = ("W8A8 folded", "head")
    given = {
        name: {
            "model": str(directories[model]),
            "use": "drafted",
            # The head, which has no quantization_config, must not take the model's method.
            "arguments": {
                "disable_log_stats": False,
                "quantization": None if model == "source" else "smoothrot",
                **drafts(directories, head),
            },
            "data": asked,
        }
        for name, (model, head) in cases.items()
    }
    return run_engines(given, tmp_path_factory.mktemp("results"))


def run_engines(
    cases: dict[str, dict[str, Any]], folder: Path, **environment: str
) -> dict[str, dict[str, Any]]:
    """What came of each case of the engine's script."""
    out = folder / "results.json"
    done = subprocess.run(
        [sys.executable, str(ENGINE), str(out)],
        input=json.dumps(cases),
        env=os.environ | ENVIRONMENT | environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=1400,
    )
    assert out.exists(), done.stdout[-2000:] + done.stderr[-4000:]
    found: dict[str, dict[str, Any]] = json.loads(out.read_text())
    return found


def drafts(directories: dict[str, Path], head: str | None) -> dict[str, Any]:
    """Arguments of an engine with a head."""
    if head is None:
        return {}
    config = {
        "method": "eagle",
        "model": str(directories[head]),
        "num_speculative_tokens": DRAFTED,
    }
    return {"speculative_config": config}


def kept(results: dict[str, dict[str, Any]], name: str) -> float:
    """Tokens kept of each draft, of :data:`DRAFTED`."""
    assert "found" in results[name], results[name]["error"]
    found = results[name]["found"]
    return float(found["accepted_tokens"] / found["drafts"])


def test_the_heads_tokens_are_kept_because_it_has_learned(
    results: dict[str, dict[str, Any]],
) -> None:
    assert kept(results, "untrained head") < 0.1
    assert 1.5 < kept(results, "source, drafted") < 2.8, "all or none would say little of others"


@pytest.mark.parametrize("name", CONVERTED)
def test_as_many_drafts_are_kept_as_on_the_16_bit_model(
    results: dict[str, dict[str, Any]], name: str
) -> None:
    source = kept(results, "source, drafted")
    assert abs(kept(results, f"{name}, drafted") / source - 1) < 0.05


@pytest.mark.parametrize("name", ["source", *CONVERTED])
def test_drafts_of_hidden_states_change_no_answer(
    results: dict[str, dict[str, Any]], name: str
) -> None:
    assert results[f"{name}, drafted"]["found"]["tokens"] == results[name]["found"]["tokens"]


def test_a_head_in_another_basis_than_the_model_is_refused(
    results: dict[str, dict[str, Any]],
) -> None:
    assert "was transformed for another model" in results["head of a converted model"]["error"]
    assert "Transform an EAGLE head" in results["original head"]["error"]
