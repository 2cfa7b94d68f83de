# SPDX-License-Identifier: Apache-2.0
"""Check a checkpoint's safetensors files by their headers, before anything large is read."""

from pathlib import Path
from typing import Any

from smoothrot_vllm.errors import CheckpointError
from smoothrot_vllm.foreign_files import read_header, read_json
from smoothrot_vllm.format import MANIFEST_NAME

INDEX_NAME = "model.safetensors.index.json"


def check_shards(directory: Path) -> None:
    """Every safetensors file is whole, and holds the tensors that the index, and the manifest if
    there is one, say it holds.

    vLLM does not notice a tensor that a quantized checkpoint lacks, and reports a damaged file
    without its name.

    Raises:
        CheckpointError: the index, the manifest or a file cannot be read, or a tensor is not where
            they put it.
    """
    advice = "Copy or download it again, or convert the model again."
    weight_map: dict[str, str] = _entry(directory / INDEX_NAME, "weight_map", advice)
    if lost := [
        name
        for name in _entry(directory / MANIFEST_NAME, "tensors", advice)
        if name not in weight_map
    ]:
        raise CheckpointError(
            f"{directory / INDEX_NAME}: expected tensor {lost[0]} (one of {len(lost)}), as"
            f" {MANIFEST_NAME} lists it, got no entry for it. {advice}"
        )
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or Path(shard).name != shard:
            raise CheckpointError(
                f"{directory / INDEX_NAME}: tensor {name}: expected a plain file name, got"
                f" {shard!r}. {advice}"
            )
    files = {directory / name for name in weight_map.values()} or set(
        directory.glob("*.safetensors")
    )
    for file in sorted(files):
        stored = read_header(file, advice)
        missing = [
            name for name, shard in weight_map.items() if shard == file.name and name not in stored
        ]
        if missing:
            more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            raise CheckpointError(
                f"{file}: expected tensor {missing[0]}{more}, as {INDEX_NAME} lists it, got a file"
                f" without it. {advice}"
            )


def _entry(file: Path, key: str, advice: str) -> dict[str, Any]:
    """The object under ``key`` of a JSON file; empty if there is no such file."""
    if not file.exists():
        return {}
    content = read_json(file, advice)
    if key not in content:
        raise CheckpointError(
            f"{file}: expected a JSON object with a {key}, got {', '.join(content) or 'nothing'}."
            f" {advice}"
        )
    found = content[key]
    if not isinstance(found, dict):
        raise CheckpointError(
            f"{file}: {key}: expected an object, got {type(found).__name__}. {advice}"
        )
    return found
