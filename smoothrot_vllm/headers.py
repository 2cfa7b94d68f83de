# SPDX-License-Identifier: Apache-2.0
"""Check a checkpoint's safetensors files by their headers, before anything large is read."""

import json
from pathlib import Path

from safetensors import SafetensorError, safe_open

from smoothrot_vllm.errors import CheckpointError

INDEX_NAME = "model.safetensors.index.json"


def check_shards(directory: Path) -> None:
    """Every safetensors file is whole, and holds the tensors that the index says it holds.

    vLLM does not notice a tensor that a quantised checkpoint lacks, and reports a damaged file without its name.

    Raises:
        CheckpointError: the index or a file cannot be read, or a tensor is not where the index puts it.
    """
    advice = "Copy or download it again, or convert the model again."
    index = directory / INDEX_NAME
    weight_map: dict[str, str] = {}
    if index.exists():
        try:
            weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{index}: expected a JSON object with a weight_map, got {error!r}. {advice}") from error
    files = {directory / name for name in weight_map.values()} or set(directory.glob("*.safetensors"))
    for file in sorted(files):
        try:
            with safe_open(file, framework="pt") as tensors:
                stored = set(tensors.keys())
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{file}: expected a whole safetensors file: {error}. {advice}") from error
        missing = [name for name, shard in weight_map.items() if shard == file.name and name not in stored]
        if missing:
            more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            raise CheckpointError(
                f"{file}: expected tensor {missing[0]}{more}, as {INDEX_NAME} lists it, got a file without it. {advice}"
            )
