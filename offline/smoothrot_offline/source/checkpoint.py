# SPDX-License-Identifier: Apache-2.0
"""Open a Hugging Face checkpoint, check it from its headers, and read it a few tensors at a
time."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self

import torch

from smoothrot_offline.device import CPU
from smoothrot_offline.source.headers import (
    ADVICE,
    CONFIG_NAME,
    FP8,
    SCALE_SUFFIX,
    block_shape,
    check_scale,
    dequantize,
    is_fp8,
    read_headers,
)
from smoothrot_offline.source.stored import TensorInfo
from smoothrot_vllm.errors import CheckpointError
from smoothrot_vllm.foreign_files import opened_safetensors

DTYPES = {
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "F64": torch.float64,
    FP8: torch.float8_e4m3fn,
    "I8": torch.int8,
    "U8": torch.uint8,
}
_SOURCE_DTYPES = ("BF16", "F16", "F32", "F64")


@dataclass(frozen=True)
class Checkpoint:
    """A directory of safetensors: its configuration and its headers. Weights are read only by
    :meth:`load`.

    ``scales`` are the scales of FP8 weights, in blocks of ``block``; they are no tensors of the
    model, and its ``config`` says nothing of them. ``device`` is where :meth:`load` puts what it
    has read. ``renamed`` says in words how the names of tensors differ from the stored ones, if
    they do.
    """

    path: Path
    config: dict[str, Any]
    tensors: Mapping[str, TensorInfo]
    scales: Mapping[str, TensorInfo] = field(default_factory=dict)
    block: tuple[int, int] = (1, 1)
    device: torch.device = CPU
    renamed: str | None = None

    def on(self, device: torch.device) -> Self:
        """The same checkpoint, to be loaded to a device."""
        return replace(self, device=device)

    def placed(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Tensors on this checkpoint's device."""
        return {name: tensor.to(self.device) for name, tensor in tensors.items()}

    @property
    def files(self) -> list[str]:
        """Names of the weight files, sorted."""
        return sorted({info.file for info in (*self.tensors.values(), *self.scales.values())})

    def load(self, names: Iterable[str]) -> dict[str, torch.Tensor]:
        """Read tensors in their stored dtype, FP8 weights in float32, to :attr:`device`.

        Raises:
            CheckpointError: a tensor is missing or cannot be read, or holds a NaN or an infinity.
        """
        wanted = list(names)
        loaded = self._read(
            wanted + [name + SCALE_SUFFIX for name in wanted if self.info(name).dtype == FP8]
        )
        for name in wanted:
            if self.info(name).dtype == FP8:
                loaded[name] = dequantize(loaded[name], loaded.pop(name + SCALE_SUFFIX), self.block)
        return self.placed(loaded)

    def _read(self, names: Iterable[str]) -> dict[str, torch.Tensor]:
        by_file: dict[str, list[str]] = {}
        for name in names:
            by_file.setdefault(self._entry(name).file, []).append(name)
        loaded: dict[str, torch.Tensor] = {}
        for file, members in by_file.items():
            with opened_safetensors(self.path / file, ADVICE) as stored:
                for name in members:
                    info = self._entry(name)
                    loaded[name] = (
                        stored.get_tensor(info.stored)
                        if info.part is None
                        else stored.get_slice(info.stored)[info.part]
                    )
        for name, tensor in loaded.items():
            if count := _count_not_finite(tensor):
                file = self._entry(name).file
                raise CheckpointError(
                    f"{self.path / file}: tensor {name}: expected finite values, got {count} NaN or"
                    " infinite ones. The checkpoint is damaged: fetch it again."
                )
        return loaded

    def _entry(self, name: str) -> TensorInfo:
        return self.scales.get(name) or self.info(name)

    def load_relative(self, prefix: str, names: Iterable[str]) -> dict[str, torch.Tensor]:
        """:meth:`load` of tensors named relative to ``prefix``, under their relative names."""
        loaded = self.load(prefix + name for name in names)
        return {name.removeprefix(prefix): tensor for name, tensor in loaded.items()}

    def info(self, name: str) -> TensorInfo:
        """Header entry of a tensor.

        Raises:
            CheckpointError: no file holds it.
        """
        if name not in self.tensors:
            raise CheckpointError(
                f"{self.path}: tensor {name} is missing from {', '.join(self.files)}."
            )
        return self.tensors[name]


def open_headers(model: str) -> Checkpoint:
    """Configuration and headers of a model given as a path or a hub id; of a hub model, no weight
    is fetched.

    Raises:
        CheckpointError: as :func:`~smoothrot_offline.source.headers.read_headers`.
    """
    found = read_headers(model)
    return _with_scales(Checkpoint(found.path, found.config, found.tensors, renamed=found.renamed))


def open_checkpoint(path: Path) -> Checkpoint:
    """Read configuration and headers; no weight is read.

    Raises:
        CheckpointError: a file is missing, truncated or malformed, or the weights are not
            safetensors.
    """
    if not path.is_dir():
        raise CheckpointError(
            f"{path}: expected a directory with {CONFIG_NAME} and safetensors; there is none."
        )
    return open_headers(str(path))


def check_source(
    checkpoint: Checkpoint, expected: Mapping[str, tuple[int, ...]], ignorable: Iterable[str] = ()
) -> None:
    """Compare headers with the tensors a model must have.

    Args:
        checkpoint: the source.
        expected: shape of each tensor.
        ignorable: tensors that may be there and are not used.

    Raises:
        CheckpointError: a tensor is missing or unexpected, or has another shape or no float dtype
            of 16 to 64 bits.
    """
    for name, shape in expected.items():
        info = checkpoint.info(name)
        where = f"{checkpoint.path / info.file}: tensor {name}"
        if info.dtype not in _SOURCE_DTYPES and not (
            info.dtype == FP8 and name + SCALE_SUFFIX in checkpoint.scales
        ):
            raise CheckpointError(
                f"{where}: expected dtype {', '.join(_SOURCE_DTYPES)}, got {info.dtype}. Convert"
                " the 16-bit original."
            )
        if info.shape != shape:
            raise CheckpointError(
                f"{where}: expected shape {shape} from config.json, got {info.shape}."
            )
    # Old checkpoints carry the rotary tables, which every loader recomputes.
    known = {*expected, *ignorable}
    unknown = [
        name
        for name in checkpoint.tensors
        if name not in known and not name.endswith(".rotary_emb.inv_freq")
    ]
    if unknown:
        info = checkpoint.tensors[unknown[0]]
        raise CheckpointError(
            f"{checkpoint.path / info.file}: tensor {unknown[0]} (one of {len(unknown)}) has no"
            " place in this architecture: converting without it would change the model. Check"
            " model_type and the bias flags in config.json."
        )


def file_digest(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal.

    Raises:
        CheckpointError: the file cannot be read.
    """
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from error


def tensor_digest(tensor: torch.Tensor) -> str:
    """SHA-256 of a tensor's bytes, row-major, in hexadecimal."""
    return hashlib.sha256(tensor.contiguous().flatten().view(torch.uint8).numpy().data).hexdigest()


def source_dtype(checkpoint: Checkpoint, name: str) -> torch.dtype:
    """Dtype of the output's 16-bit tensors: that of tensor ``name`` in the source, or bfloat16
    for a wider one."""
    dtype = DTYPES[checkpoint.info(name).dtype]
    return torch.bfloat16 if dtype in (torch.float32, torch.float64) else dtype


def _with_scales(found: Checkpoint) -> Checkpoint:
    """The checkpoint with the scales of its FP8 weights, if it has any, set apart from the
    tensors of the model."""
    if not is_fp8(found.config):
        return found
    block = block_shape(found.config)
    weights = [name for name, info in found.tensors.items() if info.dtype == FP8]
    for name in weights:
        scale = found.tensors.get(name + SCALE_SUFFIX)
        check_scale(name, found.tensors[name].shape, scale and (scale.dtype, scale.shape), block)
    scales = {name + SCALE_SUFFIX: found.tensors[name + SCALE_SUFFIX] for name in weights}
    config = {key: value for key, value in found.config.items() if key != "quantization_config"}
    tensors = {name: info for name, info in found.tensors.items() if name not in scales}
    return replace(found, config=config, tensors=tensors, scales=scales, block=block)


def _count_not_finite(tensor: torch.Tensor) -> int:
    if not tensor.is_floating_point():
        return 0
    # isfinite does not know FP8, whose only value that is not finite is NaN: all bits set but the
    # sign.
    finite = (
        (tensor.view(torch.uint8) & 0x7F) != 0x7F
        if tensor.dtype == DTYPES[FP8]
        else tensor.isfinite()
    )
    return int((~finite).sum())
