# SPDX-License-Identifier: Apache-2.0
"""The weights of a directory that may have them in many files."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

INDEX = "model.safetensors.index.json"
Tensors = dict[str, torch.Tensor]


def load_weights(directory: Path) -> Tensors:
    """Every tensor by name."""
    files = sorted(directory.glob("*.safetensors"))
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def file_of(directory: Path, tensor: str) -> Path:
    """The file that the index says holds a tensor."""
    return directory / json.loads((directory / INDEX).read_text())["weight_map"][tensor]


def edit_file(directory: Path, tensor: str, edit: Callable[[Tensors], Any]) -> Path:
    """Change the file that holds a tensor, and nothing else."""
    file = file_of(directory, tensor)
    tensors = load_file(file)
    edit(tensors)
    save_file(tensors, file, metadata={"format": "pt"})
    return file


def in_one_file(directory: Path, tensors: Tensors) -> None:
    """Replace the weights by ``tensors`` in one file, and the index by theirs."""
    for file in directory.glob("*.safetensors"):
        file.unlink()
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": dict.fromkeys(tensors, "model.safetensors")}
    (directory / INDEX).write_text(json.dumps(index))
