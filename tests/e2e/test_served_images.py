# SPDX-License-Identifier: Apache-2.0
"""Vision-language models: vLLM's engine, in one process for all of them, answers text and images as
the reference does."""

import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from reference_forward import SAFE_MARGIN, STARTS, Reference
from tiny_composites import save_tiny_composite
from tiny_models import convert
from vision_packages import vision_packages

pytestmark = [pytest.mark.serve, pytest.mark.timeout(1500)]

CONVERSIONS: dict[str, tuple[str, ...]] = {
    "qwen2_5_vl": ("--activation-bits", "8"),
    "qwen3_vl": ("--activation-bits", "8", "--group-size", "32", "--rounding", "gptq"),
    "mistral3": ("--activation-bits", "8", "--lm-head-bits", "8"),
    "mistral3, ministral3": ("--activation-bits", "8"),
    "idefics3": ("--activation-bits", "8"),
    "smolvlm": ("--activation-bits", "8", "--no-rotate"),
    "gemma3": ("--activation-bits", "8"),
    "gemma4": ("--activation-bits", "8"),
    "gemma4, large": ("--activation-bits", "8"),
}
_QWEN_IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"
PLACEHOLDERS = {
    "qwen2_5_vl": _QWEN_IMAGE,
    "qwen3_vl": _QWEN_IMAGE,
    "mistral3": "[IMG]",
    "mistral3, ministral3": "[IMG]",
    "idefics3": "<image>",
    "smolvlm": "<image>",
    "gemma4": "<|image|>",
}
TWO_WAY = {"gemma3": "<start_of_image>", "gemma4, large": "<|image|>"}
"""Those that attend to an image in both directions, and what stands for one."""
IMAGES, TEXTS = 18, 12
ENGINE = Path(__file__).with_name("serve_images_in_process.py")
ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
}


def prompts(family: str) -> list[str]:
    """With an image where the model is served with any, then without."""
    image = PLACEHOLDERS.get(family)
    seen = [f"{STARTS[number % 6]} {number} {image} is" for number in range(IMAGES if image else 0)]
    return seen + [f"{STARTS[number % 6]} {number}" for number in range(TEXTS)]


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Converted directories by family; those of ``TWO_WAY`` also as ``seeing`` ones."""
    folder = tmp_path_factory.mktemp("images")
    calibration = ("--calib", "generated", "--calib-samples", "4", "--calib-seqlen", "64")
    found = {
        family: convert(
            save_tiny_composite(folder / "sources" / family, family),
            folder / family,
            *calibration,
            *options,
        )
        for family, options in CONVERSIONS.items()
    }
    for family in TWO_WAY:
        found[f"seeing {family}"] = folder / f"seeing {family}"
        found[f"seeing {family}"].symlink_to(found[family])
    return found


@pytest.fixture(scope="module")
def answers(converted: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the engine makes of the prompts, by family: see the engine's script."""
    out = tmp_path_factory.mktemp("answers") / "answers.json"
    asked = {
        str(converted[family]): {
            "prompts": prompts(family),
            "images": IMAGES if family in PLACEHOLDERS else 0,
            "videos": family not in TWO_WAY,
        }
        for family in CONVERSIONS
    }
    for family, image in TWO_WAY.items():
        asked[str(converted[f"seeing {family}"])] = {"prompts": [image], "images": 1}
    path = os.pathsep.join(filter(None, [str(vision_packages()), os.environ.get("PYTHONPATH")]))
    result = subprocess.run(
        [sys.executable, str(ENGINE), str(out)],
        input=json.dumps(asked),
        env=os.environ | ENVIRONMENT | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
        timeout=1400,
    )
    assert out.exists(), result.stdout[-2000:] + result.stderr[-4000:]
    found = json.loads(out.read_text())
    return {family: found[str(directory)] for family, directory in converted.items()}


@pytest.mark.parametrize("family", CONVERSIONS)
def test_text_and_images_are_answered_as_by_the_reference(
    converted: dict[str, Path], answers: dict[str, Any], family: str
) -> None:
    assert isinstance(answers[family], list), answers[family]
    reference = Reference(converted[family])
    outer = reference.model.config
    places = {getattr(outer, f"{kind}_token_id", None) for kind in ("image", "video", "audio")}
    differences: dict[str, list[float]] = {"image": [], "text": []}
    for answer in answers[family]:
        inputs = {name: torch.tensor(value) for name, value in answer["inputs"].items()}
        prompt = inputs.pop("input_ids")[0].tolist()
        assert answer["prompt"] == prompt
        # Written, transformers takes such a token for a place to fill, vLLM for a token.
        if not places.isdisjoint(answer["tokens"]):
            continue
        kind = "image" if "pixel_values" in inputs else "text"
        # All tokens are attended to; of an image as large as the model's all pixels are.
        seen = {name: inputs[name] for name in inputs if "mask" not in name}
        expected = reference.greedy(prompt, len(answer["tokens"]), seen if kind == "image" else {})
        if expected.is_determined:
            assert answer["tokens"] == expected.tokens
            differences[kind] += [
                abs(got - want)
                for got, want in zip(answer["logprobs"], expected.logprobs, strict=True)
            ]
    for kind in ("image", "text") if family in PLACEHOLDERS else ("text",):
        assert len(differences[kind]) >= 8, f"too few prompts with {kind}: choose others"
        assert statistics.median(differences[kind]) < 1e-5
        assert max(differences[kind]) < SAFE_MARGIN


@pytest.mark.parametrize("family", TWO_WAY)
def test_images_attended_to_in_both_directions_are_refused_on_cpus(
    answers: dict[str, Any], family: str
) -> None:
    assert "--limit-mm-per-prompt: not with this converted model" in answers[f"seeing {family}"]
