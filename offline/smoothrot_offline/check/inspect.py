# SPDX-License-Identifier: Apache-2.0
"""A converted directory in figures, and the bytes of a checkpoint by what they are for."""

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict

from smoothrot_offline.config import ConvertConfig, make_schema, stays_tied
from smoothrot_offline.output.manifest import Manifest, read_manifest
from smoothrot_offline.source.checkpoint import DTYPES, Checkpoint, open_checkpoint
from smoothrot_offline.source.family import ModelSpec
from smoothrot_offline.source.resolve import resolve
from smoothrot_vllm.errors import CheckpointError, ConfigError
from smoothrot_vllm.format import (
    GROUP_SCALE_MAX,
    QUANT_METHOD,
    QuantizationSchema,
    parse_schema,
)
from smoothrot_vllm.reference import unpack_group_scale

TensorTable = Mapping[str, tuple[tuple[int, ...], torch.dtype]]
"""Shape and dtype by tensor name."""


class Sizes(BaseModel):
    """Bytes: decoder linears with their scales, embedding, head (0 if tied), and the
    rest: norms, biases, what is beside a text tower, a draft head."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    linears: int
    embedding: int
    lm_head: int
    other: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.linears + self.embedding + self.lm_head + self.other


def measure(spec: ModelSpec, tensors: Mapping[str, int]) -> Sizes:
    """Sizes of a checkpoint of this model, source or output, by the bytes of its tensors."""
    table = spec.architecture
    linears = {name for name, _, _ in spec.output_linears(tied=True)}
    bytes_of = dict.fromkeys(Sizes.model_fields, 0)
    for name, count in tensors.items():
        module, _, suffix = name.rpartition(".")
        if module == table.embedding:
            kind = "embedding"
        elif module == table.lm_head:
            kind = "lm_head"
        elif suffix != "bias" and module in linears:
            kind = "linears"
        else:
            kind = "other"
        bytes_of[kind] += count
    return Sizes(**bytes_of)


def table_bytes(tensors: TensorTable) -> dict[str, int]:
    """Bytes of each tensor."""
    return {name: math.prod(shape) * dtype.itemsize for name, (shape, dtype) in tensors.items()}


def output_sizes(spec: ModelSpec, config: ConvertConfig, dtype: torch.dtype) -> Sizes:
    """Sizes of what a conversion writes.

    Raises:
        ConfigError, UnsupportedModelError: the options do not fit the model.
    """
    tensors = spec.output_tensors(make_schema(spec, config), stays_tied(spec, config), dtype)
    return measure(spec, table_bytes(tensors))


def open_converted(directory: Path) -> tuple[Checkpoint, ModelSpec, QuantizationSchema]:
    """Configuration, headers and schema of a converted directory.

    Raises:
        CheckpointError: it is damaged, or no SmoothRot checkpoint.
        ConfigError: its ``quantization_config`` is not valid.
        UnsupportedModelError: its architecture is unknown.
    """
    checkpoint = open_checkpoint(directory, unpack=False)
    quantization = checkpoint.config.get("quantization_config")
    if not isinstance(quantization, dict) or quantization.get("quant_method") != QUANT_METHOD:
        raise CheckpointError(
            f"{directory}: expected quantization_config with quant_method {QUANT_METHOD!r} in"
            " config.json."
        )
    plain = {key: value for key, value in checkpoint.config.items() if key != "quantization_config"}
    schema = parse_schema(quantization)
    return checkpoint, resolve(plain, schema.ignore), schema


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


def group_scale_problem(stored: torch.Tensor, groups: int) -> str | None:
    """What makes stored group scales, uint8 ``(N, ceil(groups/2))``, unusable; None if nothing
    does."""
    nibbles = unpack_group_scale(stored, 2 * stored.shape[1])
    if not nibbles[:, :groups].all():
        place = (nibbles[:, :groups] == 0).nonzero()[0].tolist()
        return f"expected group scales from 1 to {GROUP_SCALE_MAX}, got 0 at {place}"
    if nibbles[:, groups:].any():
        row = int(nibbles[:, groups].nonzero()[0])
        return (
            f"expected 0 in the nibble past the last of {groups} groups, got"
            f" {nibbles[row, groups]} in row {row}"
        )
    return None


class Inspection(BaseModel):
    """A converted model: what it is, how it is stored, its size beside the same model in 16 bits,
    and how it was made.

    ``origin`` is the manifest without the digests of the output.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    architecture: str
    layers: int
    dtype: str
    quantization: QuantizationSchema
    output_bytes: Sizes
    sixteen_bit_bytes: Sizes
    ratio_total: float
    ratio_linears: float
    origin: dict[str, Any]


def inspect(directory: Path) -> Inspection:
    """Read headers and manifest; no weight is read.

    ``sixteen_bit_bytes`` are those of the source: its embedding is counted once if it was shared
    with the head.

    Raises:
        SmoothRotError: the directory is no converted checkpoint, or is damaged.
    """
    checkpoint, spec, schema = open_converted(directory)
    manifest = read_manifest(directory)
    dtype = model_dtype(checkpoint.config)
    after = measure(spec, checkpoint.stored_bytes(checkpoint.tensors))
    shapes = spec.source_tensors()
    if manifest.source.tied:
        shapes.pop(f"{spec.architecture.lm_head}.weight", None)
    before = measure(spec, table_bytes({name: (shape, dtype) for name, shape in shapes.items()}))
    return Inspection(
        architecture=spec.architecture.class_name,
        layers=spec.layers,
        dtype=str(dtype).removeprefix("torch."),
        quantization=schema,
        output_bytes=after,
        sixteen_bit_bytes=before,
        ratio_total=before.total / after.total,
        ratio_linears=before.linears / after.linears,
        origin=manifest.model_dump(mode="json", exclude={"tensors", "files"}),
    )
