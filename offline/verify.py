# SPDX-License-Identifier: Apache-2.0
"""Check a converted directory, byte by byte, against its schema and its manifest."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict

from smoothrot_offline.architectures import ModelSpec, resolve
from smoothrot_offline.checkpoint import (
    DTYPES,
    Checkpoint,
    file_digest,
    open_checkpoint,
    tensor_digest,
)
from smoothrot_offline.manifest import Manifest, read_manifest
from smoothrot_offline.progress import ProgressCallback, no_progress
from smoothrot_vllm.errors import CheckpointError, ConfigError
from smoothrot_vllm.format import QUANT_METHOD, WEIGHT_SCALE, QuantizationSchema, parse_schema


class Verification(BaseModel):
    """What was checked and every problem found; ``ok`` if there is none."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    ok: bool
    tensors: int
    files: int
    bytes: int
    problems: list[str]


def open_converted(directory: Path) -> tuple[Checkpoint, ModelSpec, QuantizationSchema]:
    """Configuration, headers and schema of a converted directory.

    Raises:
        CheckpointError: it is damaged, or no SmoothRot checkpoint.
        ConfigError: its ``quantization_config`` is not valid.
        UnsupportedModelError: its architecture is unknown.
    """
    checkpoint = open_checkpoint(directory)
    quantization = checkpoint.config.get("quantization_config")
    if not isinstance(quantization, dict) or quantization.get("quant_method") != QUANT_METHOD:
        raise CheckpointError(
            f"{directory}: expected quantization_config with quant_method {QUANT_METHOD!r} in"
            " config.json."
        )
    plain = {key: value for key, value in checkpoint.config.items() if key != "quantization_config"}
    return checkpoint, resolve(plain), parse_schema(quantization)


def model_dtype(config: dict[str, Any]) -> torch.dtype:
    """Dtype of the 16-bit tensors, from ``config.json``.

    Raises:
        ConfigError: it names none.
    """
    name = config.get("dtype") or config.get("torch_dtype")
    dtype = {"bfloat16": torch.bfloat16, "float16": torch.float16}.get(str(name))
    if dtype is None:
        raise ConfigError(f"config.json: dtype: expected bfloat16 or float16, got {name!r}.")
    return dtype


def verify(directory: Path, progress: ProgressCallback = no_progress) -> Verification:
    """Read everything: structure against the schema, every tensor and file against the manifest's
    digests.

    Raises:
        SmoothRotError: the directory cannot be opened as a converted checkpoint at all.
    """
    checkpoint, spec, schema = open_converted(directory)
    manifest = read_manifest(directory)
    expected = spec.output_tensors(schema, spec.tied, model_dtype(checkpoint.config))
    problems = [*structure_problems(checkpoint, expected, manifest)]
    names = [name for name in manifest.tensors if name in checkpoint.tensors]
    total = len(names) + len(manifest.files)
    for done, name in enumerate(names):
        progress("tensors", done, total)
        problems += _tensor_problems(checkpoint, manifest, name)
    for done, (name, digest) in enumerate(manifest.files.items(), start=len(names)):
        progress("files", done, total)
        path = directory / name
        if not path.is_file():
            problems.append(f"{path}: the file is missing")
        elif file_digest(path) != digest:
            problems.append(f"{path}: the file is not the one that was written (SHA-256 differs)")
    progress("done", total, total)
    return Verification(
        ok=not problems,
        tensors=len(names),
        files=len(manifest.files),
        bytes=sum((directory / file).stat().st_size for file in checkpoint.files),
        problems=problems,
    )


def structure_problems(
    checkpoint: Checkpoint,
    expected: dict[str, tuple[tuple[int, ...], torch.dtype]],
    manifest: Manifest,
) -> Iterator[str]:
    """Every tensor whose header is not the one that ``expected`` has, or that the manifest has
    not in its file."""
    for name, (shape, dtype) in expected.items():
        info = checkpoint.tensors.get(name)
        if info is None:
            yield f"tensor {name}: missing"
        elif (info.shape, DTYPES.get(info.dtype)) != (shape, dtype):
            yield (
                f"tensor {name} in {info.file}: expected {dtype} {shape}, got {info.dtype}"
                f" {info.shape}"
            )
    for name, info in checkpoint.tensors.items():
        if name not in expected:
            yield f"tensor {name} in {info.file}: not part of this model"
        elif name not in manifest.tensors:
            yield f"tensor {name} in {info.file}: not in the manifest"
        elif manifest.tensors[name].file != info.file:
            yield (
                f"tensor {name}: the manifest has it in {manifest.tensors[name].file}, the index in"
                f" {info.file}"
            )


def _tensor_problems(checkpoint: Checkpoint, manifest: Manifest, name: str) -> Iterator[str]:
    where = f"tensor {name} in {checkpoint.tensors[name].file}"
    try:
        tensor = checkpoint.load([name])[name]
    except CheckpointError as error:
        yield str(error)
        return
    # Scales of another dtype, which may have no order, are a problem of the structure.
    if (
        name.endswith(f".{WEIGHT_SCALE}")
        and tensor.dtype == torch.float32
        and not (tensor > 0).all()
    ):
        yield f"{where}: expected positive scales, got {int((tensor <= 0).sum())} others"
    if tensor_digest(tensor) != manifest.tensors[name].sha256:
        yield f"{where}: its bytes are not the ones that were written (SHA-256 differs)"
