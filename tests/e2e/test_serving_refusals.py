# SPDX-License-Identifier: Apache-2.0
"""What must not be served ends ``vllm serve`` with a message that says why, and never answers a request."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from serving import VllmServer

pytestmark = [pytest.mark.serve, pytest.mark.timeout(600)]

CONVERSION = ("--activation-bits", "8", "--lm-head-bits", "8", "--max-tp", "1")
DOWN = "model.layers.1.mlp.down_proj"
UP = "model.layers.0.mlp.up_proj"


def weights_of(directory: Path) -> Path:
    (file,) = directory.glob("*.safetensors")
    return file


def edit_tensors(directory: Path, edit: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(weights_of(directory))
    edit(tensors)
    save_file(tensors, weights_of(directory), metadata={"format": "pt"})


def truncate(directory: Path) -> None:
    content = weights_of(directory).read_bytes()
    weights_of(directory).write_bytes(content[: len(content) // 2])


def unknown_version(directory: Path) -> None:
    config = json.loads((directory / "config.json").read_text())
    config["quantization_config"]["format_version"] = 99
    (directory / "config.json").write_text(json.dumps(config))


def nan_scale(directory: Path) -> None:
    edit_tensors(directory, lambda tensors: tensors[f"{DOWN}.weight_scale"].view(-1)[5].fill_(torch.nan))


def drop(name: str) -> Callable[[Path], None]:
    return lambda directory: edit_tensors(directory, lambda tensors: tensors.pop(name))


@pytest.mark.parametrize(
    ("damage", "ranks", "message"),
    [
        pytest.param(
            lambda directory: None, 2, "tensor parallel size 2: each rank would hold 192/2 down_proj inputs", id="wrong TP"
        ),
        pytest.param(truncate, 1, "model-00001-of-00001.safetensors: expected a whole safetensors file", id="truncated shard"),
        pytest.param(unknown_version, 1, "quantization_config.format_version: expected 1, got 99", id="unknown format version"),
        pytest.param(
            drop(f"{UP}.weight_packed"),
            1,
            f"model-00001-of-00001.safetensors: expected tensor {UP}.weight_packed",
            id="missing codes",
        ),
        pytest.param(
            drop("model.norm.weight"), 1, "model-00001-of-00001.safetensors: expected tensor model.norm.weight", id="missing norm"
        ),
        pytest.param(
            nan_scale, 1, f"{DOWN}.weight_scale (parts down_proj): expected finite scales > 0, got 1 others", id="NaN scale"
        ),
    ],
)
def test_refused_with_the_reason(
    tiny_converted: Callable[..., Path], tmp_path: Path, damage: Callable[[Path], None], ranks: int, message: str
) -> None:
    directory = tmp_path / "model"
    shutil.copytree(tiny_converted("llama", *CONVERSION), directory)
    damage(directory)
    log = tmp_path / "server.log"
    server = VllmServer(directory, log, "--enforce-eager", "--max-model-len", "256", tensor_parallel=ranks)
    server.start()
    try:
        status = server.wait()
    finally:
        server.stop()
    assert status != 0
    written = log.read_text(errors="replace")
    assert message in written, written[-4000:]
    assert "Application startup complete" not in written
