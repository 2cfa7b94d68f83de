# SPDX-License-Identifier: Apache-2.0
"""Sources that are changed so that a conversion must be refused."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from smoothrot_offline.config import make_config
from smoothrot_offline.convert import convert
from smoothrot_vllm.errors import (
    SmoothRotError,
)

WEIGHTS = "model.safetensors"


def edit_config(directory: Path, **changes: Any) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_weights(directory: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(directory / WEIGHTS)
    change(tensors)
    save_file(tensors, directory / WEIGHTS, metadata={"format": "pt"})


def refusal(source: Path, **options: Any) -> SmoothRotError:
    out = source.parent / "out"
    with pytest.raises(SmoothRotError) as caught:
        convert(source, out, make_config(**{"scales": "none"} | options))
    assert [path.name for path in source.parent.iterdir()] == [source.name], (
        "a refusal leaves nothing behind"
    )
    return caught.value
