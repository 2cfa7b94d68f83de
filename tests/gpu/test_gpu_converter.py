# SPDX-License-Identifier: Apache-2.0
"""The converter on a GPU: the same bytes twice, and next to the CPU's result."""

import hashlib
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import SHORT_TEXT, save_tiny_model

from smoothrot_offline.check.verify import verify
from smoothrot_offline.config import make_config
from smoothrot_offline.convert import convert
from smoothrot_offline.output.manifest import read_manifest
from smoothrot_offline.report.evaluate import evaluate_perplexity

OPTIONS: dict[str, Any] = {
    "calib": str(SHORT_TEXT),
    "calib_samples": 4,
    "calib_seqlen": 64,
    "group_size": 32,
}
RECIPES: dict[str, dict[str, Any]] = {
    "rtn": {"lm_head_bits": 4, "smooth_norms": True},
    "best": {
        "rounding": "gptq",
        "hessian": "model",
        "smooth_norms": True,
        "clip_search": True,
        "keep_8bit": 0.1,
    },
    "learned": {"scales": "learned", "rotations": "learned", "rotation_steps": 5, "sign_seeds": 2},
    "generated": {"calib": "generated", "rounding": "gptq"},
}


def content(directory: Path) -> dict[str, str]:
    return {
        file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in directory.iterdir()
    }


def weight_errors(directory: Path) -> list[float]:
    return [
        error for layer in read_manifest(directory).layers for error in layer.weight_error.values()
    ]


@pytest.mark.parametrize("family", ["llama", "gemma3", "mixtral"])
@pytest.mark.parametrize("recipe", RECIPES)
def test_twice_the_same_bytes_and_the_cpus_errors(
    device: torch.device, tmp_path: Path, family: str, recipe: str
) -> None:
    source, config = (
        save_tiny_model(tmp_path / "model", family),
        make_config(**OPTIONS | RECIPES[recipe]),
    )
    for name in ("first", "second"):
        convert(source, tmp_path / name, config, device=device)
    assert verify(tmp_path / "first").ok
    assert content(tmp_path / "first") == content(tmp_path / "second")
    convert(source, tmp_path / "cpu", config)
    # Of learned or searched numbers, and of text that the model writes, a last bit can lead
    # elsewhere.
    assert weight_errors(tmp_path / "first") == pytest.approx(
        weight_errors(tmp_path / "cpu"), rel=1e-4 if recipe == "rtn" else 0.1
    )


def test_rounding_to_nearest_has_nearly_all_of_the_cpus_codes(
    device: torch.device, tmp_path: Path
) -> None:
    source = save_tiny_model(tmp_path / "model", "llama")
    for name, where in (("gpu", device), ("cpu", torch.device("cpu"))):
        convert(
            source, tmp_path / name, make_config(scales="none", activation_bits=8), device=where
        )
    found, expected = (
        load_file(tmp_path / name / "model-00001-of-00001.safetensors") for name in ("gpu", "cpu")
    )
    for name, tensor in expected.items():
        assert (found[name] != tensor).double().mean() < 1e-3, name
    # The very checkpoint on both devices: the same codes and integer sums, other float sums.
    on_gpu, on_cpu = (
        evaluate_perplexity(tmp_path / "cpu", SHORT_TEXT, 128, 2, device=where).nll
        for where in (device, torch.device("cpu"))
    )
    assert on_gpu == pytest.approx(on_cpu, rel=1e-3)
