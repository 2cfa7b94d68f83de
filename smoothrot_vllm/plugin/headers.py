# SPDX-License-Identifier: Apache-2.0
"""Directories that a server is pointed at are checked by their JSON files and the headers of their
tensors, before anything large is read: a checkpoint, one to reload from, an adapter.

vLLM does not notice what is missing from a quantized checkpoint, nor what an adapter is an adapter
of.
"""

from pathlib import Path
from typing import Any

from smoothrot_vllm.errors import CheckpointError, ConfigError
from smoothrot_vllm.foreign_files import read_header, read_json
from smoothrot_vllm.format import (
    ADAPTER_BASE,
    ADAPTER_CONFIG,
    MANIFEST_NAME,
    QUANT_METHOD,
    QuantizationSchema,
    parse_schema,
)

INDEX_NAME = "model.safetensors.index.json"


def check_shards(directory: Path) -> None:
    """Every safetensors file is whole, and holds the tensors that the index, and the manifest if
    there is one, say it holds.

    vLLM would report a damaged file without its name.

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


def check_reloaded(directory: Path, served: QuantizationSchema) -> QuantizationSchema:
    """Refuse a directory unless its tensors can take the place of the served ones.

    Returns:
        Its schema, which differs from ``served`` at most in ``transform_sha256``.

    Raises:
        CheckpointError: it is no whole converted model.
        ConfigError: its tensors mean something else than those of the served one.
    """
    path = directory / "config.json"
    found = read_json(path, "Name a directory that smoothrot-convert wrote.").get(
        "quantization_config"
    )
    method = found.get("quant_method") if isinstance(found, dict) else None
    if not isinstance(found, dict) or method != QUANT_METHOD:
        raise ConfigError(
            f"reload_weights: {path}: expected quant_method {QUANT_METHOD!r}, got {method!r}. Name"
            " a directory that smoothrot-convert wrote, or start another server."
        )
    schema = parse_schema(found)
    for name in QuantizationSchema.model_fields:
        expected, got = getattr(served, name), getattr(schema, name)
        if got != expected and name != "transform_sha256":
            raise ConfigError(
                f"reload_weights: {path}: quantization_config.{name}: expected the served model's"
                f" {expected}, got {got}. Convert it with the same options, or start another server"
                " for it."
            )
    check_shards(directory)
    return schema


def check_adapter(adapter: Path, transform_sha256: str | None) -> None:
    """Refuse a LoRA adapter unless it was transformed as the served weights were: one of the
    original model would be added to weights in another basis, and answers be wrong without a word.

    Args:
        adapter: directory with ``adapter_config.json``, in which ``smoothrot-convert lora`` names
            the transform it applied. One without is left to vLLM, which does not load it.
        transform_sha256: of the served checkpoint's ``quantization_config``.

    Raises:
        ConfigError: the adapter was not transformed, or for another model, or its configuration
            cannot be read, or the checkpoint does not say how it was transformed itself.
    """
    path = adapter / ADAPTER_CONFIG
    if not path.exists():
        return
    if transform_sha256 is None:
        raise ConfigError(
            f"LoRA adapter {adapter}: the served checkpoint does not say how its weights were"
            " transformed (quantization_config.transform_sha256). Convert the model again, then"
            " the adapter."
        )
    try:
        found = read_json(path, "Save or download the adapter again.").get(ADAPTER_BASE)
    except CheckpointError as error:
        raise ConfigError(f"LoRA adapter: {error}") from error
    if found != transform_sha256:
        what = (
            "is of the original model"
            if found is None
            else "was transformed for another conversion"
        )
        raise ConfigError(
            f"LoRA adapter {adapter} {what}: expected {ADAPTER_BASE} {transform_sha256} in"
            f" {ADAPTER_CONFIG}, got {found}. Run `smoothrot-convert lora ADAPTER OUT --base DIR`"
            " with the served directory, and serve OUT."
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
