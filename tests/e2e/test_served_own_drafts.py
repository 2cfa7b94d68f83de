# SPDX-License-Identifier: Apache-2.0
"""Models' own heads for multi-token prediction in vLLM's engine: as many of their tokens are kept
on a converted model as on the 16-bit one, and none changes an answer."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from test_served_drafts import CALIBRATION, PROMPT, PROMPTS, TOKENS, kept, run_engines
from test_served_linear_attention import STAND_INS
from tiny_heads import Language, MtpHead, add_own_head, save_model, train_head, trained_model
from tiny_models import byte_tokenizer, convert

pytestmark = [pytest.mark.serve, pytest.mark.slow, pytest.mark.timeout(1800)]

W8A8 = ("--weight-bits", "8", "--activation-bits", "8")
W4A8 = ("--activation-bits", "8", "--group-size", "32", "--rounding", "gptq")
CONVERSIONS: dict[str, dict[str, tuple[str, ...]]] = {
    "qwen3_5": {
        f"{bits} {residual}": (*options, "--lm-head-bits", "8", "--residual", residual)
        for bits, options in {"W8A8": W8A8, "W4A8": W4A8}.items()
        for residual in ("online", "folded")
    },
    # The head has experts of its own, which stay 16-bit.
    "qwen3_5_moe": {"W8A8 folded": W8A8},
}
STEPS = {"qwen3_5": (400, 40), "qwen3_5_moe": (150, 60)}
"""Of training the model, and its head."""
CONVERTED = [f"{family}, {name}" for family, options in CONVERSIONS.items() for name in options]
NAMES = [*(f"{family}, source" for family in CONVERSIONS), *CONVERTED]
DRAFTED = 3


@pytest.fixture(scope="module")
def language() -> Language:
    return Language.made_up()


@pytest.fixture(scope="module")
def directories(language: Language, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Each source and its conversions."""
    found = {}
    for family, conversions in CONVERSIONS.items():
        folder, (steps, head_steps) = tmp_path_factory.mktemp(family), STEPS[family]
        model = trained_model(language, family, steps)
        torch.manual_seed(1)
        head = MtpHead(model)
        train_head(head, model, language, head_steps)
        source = add_own_head(head, save_model(model, folder / "source"))
        text = folder / "text.txt"
        text.write_text("\n".join(byte_tokenizer().batch_decode(language.texts(64, 256))))
        found[f"{family}, source"] = source
        for name, options in conversions.items():
            out = folder / name.replace(" ", "-")
            convert(source, out, *CALIBRATION, "--calib", str(text), *options)
            found[f"{family}, {name}"] = out
    return found


@pytest.fixture(scope="module")
def results(
    directories: dict[str, Path], language: Language, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, dict[str, Any]]:
    """What came of each engine, with drafts and without."""
    asked = {"prompts": language.texts(PROMPTS, PROMPT).tolist(), "tokens": TOKENS}
    # What vLLM's kernels for linear attention, and for drafts behind it, take on a CPU.
    plain = {"dtype": "bfloat16", "enable_prefix_caching": False, "disable_log_stats": False}
    config = {"method": "mtp", "num_speculative_tokens": DRAFTED}
    given = {
        name + told: {
            "model": str(directory),
            "use": "drafted",
            "arguments": plain | added,
            "data": asked,
        }
        for name, directory in directories.items()
        for told, added in {"": {}, ", drafted": {"speculative_config": config}}.items()
    }
    path = os.pathsep.join(filter(None, (str(STAND_INS), os.environ.get("PYTHONPATH"))))
    return run_engines(given, tmp_path_factory.mktemp("results"), PYTHONPATH=path)


@pytest.mark.parametrize("family", CONVERSIONS)
def test_some_of_the_sources_own_drafts_are_kept(
    results: dict[str, dict[str, Any]], family: str
) -> None:
    found = kept(results, f"{family}, source, drafted")
    assert 1.2 < found < 2.8, "all or none would say little of others"


@pytest.mark.parametrize("name", CONVERTED)
def test_as_many_own_drafts_are_kept_as_on_the_16_bit_model(
    results: dict[str, dict[str, Any]], name: str
) -> None:
    source = kept(results, f"{name.partition(',')[0]}, source, drafted")
    assert abs(kept(results, f"{name}, drafted") / source - 1) < 0.05


@pytest.mark.parametrize("name", NAMES)
def test_own_drafts_change_no_answer(results: dict[str, dict[str, Any]], name: str) -> None:
    answers, drafted = (results[found]["found"]["tokens"] for found in (name, f"{name}, drafted"))
    assert drafted == answers
