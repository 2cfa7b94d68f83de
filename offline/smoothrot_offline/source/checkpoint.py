# SPDX-License-Identifier: Apache-2.0
"""Open a Hugging Face checkpoint, check it from its headers, and read it a few tensors at a
time."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self

import torch

from smoothrot_offline.device import CPU
from smoothrot_offline.source.headers import (
    ADVICE,
    CONFIG_NAME,
    read_headers,
)
from smoothrot_offline.source.packings.fp8 import FP8
from smoothrot_offline.source.packings.packed import Packed, Packing
from smoothrot_offline.source.packings.table import find_packing
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
    "I32": torch.int32,
    "I64": torch.int64,
    "U8": torch.uint8,
}
_SOURCE_DTYPES = ("BF16", "F16", "F32", "F64")
_UNPACKED = "F32"
"""Dtype of a packed weight once it is loaded."""


@dataclass(frozen=True)
class Checkpoint:
    """A directory of safetensors: its configuration and its headers. Weights are read only by
    :meth:`load`.

    Weights that are stored as other tensors are ``packed``, by ``packing``; those others are
    ``parts`` and no tensors of the model, and its ``config`` says nothing of them. ``device`` is
    where :meth:`load` puts what it has read. ``renamed`` says in words how the names of tensors
    differ from the stored ones, if they do.
    """

    path: Path
    config: dict[str, Any]
    tensors: Mapping[str, TensorInfo]
    packing: Packing | None = None
    packed: Mapping[str, Packed] = field(default_factory=dict)
    parts: Mapping[str, TensorInfo] = field(default_factory=dict)
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
        return sorted({info.file for info in (*self.tensors.values(), *self.parts.values())})

    def load(self, names: Iterable[str]) -> dict[str, torch.Tensor]:
        """Read tensors in their stored dtype, packed weights in float32, to :attr:`device`.

        Raises:
            CheckpointError: a tensor is missing or cannot be read, or holds a NaN or an infinity,
                or a packed weight a value that its packing does not have.
        """
        wanted = list(dict.fromkeys(names))
        stored = self._read(wanted)
        loaded = {}
        for name in wanted:
            packed = self.packed.get(name)
            if packed is None:
                loaded[name] = stored.pop(name)
                continue
            assert self.packing is not None
            parts = {role: stored.pop(part) for role, part in packed.parts.items()}
            loaded[name] = self.packing.unpack(name, parts)
            self._check_finite(name, loaded[name])
        return self.placed(loaded)

    def _read(self, names: Iterable[str]) -> dict[str, torch.Tensor]:
        """Stored tensors; in place of a packed weight, those that it is stored as."""
        by_file: dict[str, dict[str, TensorInfo]] = {}
        for name in names:
            for part, info in self._stored(name).items():
                by_file.setdefault(info.file, {})[part] = info
        loaded: dict[str, torch.Tensor] = {}
        for file, members in by_file.items():
            with opened_safetensors(self.path / file, ADVICE) as tensors:
                for name, info in members.items():
                    loaded[name] = (
                        tensors.get_tensor(info.stored)
                        if info.part is None
                        else tensors.get_slice(info.stored)[info.part]
                    )
                    if info.turned:
                        loaded[name] = loaded[name].T.contiguous()
        for name, tensor in loaded.items():
            self._check_finite(name, tensor)
        return loaded

    def _stored(self, name: str) -> dict[str, TensorInfo]:
        """What a tensor is stored as, by full names."""
        packed = self.packed.get(name)
        if packed is None:
            return {name: self.info(name)}
        return {part: self.parts[part] for part in packed.parts.values()}

    def _check_finite(self, name: str, tensor: torch.Tensor) -> None:
        if count := _count_not_finite(tensor):
            file = (self.parts.get(name) or self.info(name)).file
            raise CheckpointError(
                f"{self.path / file}: tensor {name}: expected finite values, got {count} NaN or"
                " infinite ones. The checkpoint is damaged: fetch it again."
            )

    def stored_bytes(self, names: Iterable[str]) -> dict[str, int]:
        """Bytes of each tensor in its file, of a packed weight with its scales.

        Raises:
            CheckpointError: no file holds one, or it has a dtype that none of a model has.
        """
        found = {}
        for name in names:
            found[name] = 0
            for part, info in self._stored(name).items():
                if info.dtype not in DTYPES:
                    raise CheckpointError(
                        f"{self.path / info.file}: tensor {part}: expected dtype"
                        f" {', '.join(DTYPES)}, got {info.dtype}. Fetch or convert the model again."
                    )
                found[name] += math.prod(info.shape) * DTYPES[info.dtype].itemsize
        return found

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


def open_headers(model: str, unpack: bool = True) -> Checkpoint:
    """:func:`open_checkpoint` of a model given as a path or a hub id; of a hub model, no weight is
    fetched.

    Raises:
        CheckpointError: as :func:`~smoothrot_offline.source.headers.read_headers`, or the tensors
            of packed weights are not those of their packing.
        UnsupportedModelError: as :func:`find_packing`.
    """
    found = read_headers(model)
    stored = Checkpoint(found.path, found.config, found.tensors, renamed=found.renamed)
    return _unpacked(stored) if unpack else stored


def open_checkpoint(path: Path, unpack: bool = True) -> Checkpoint:
    """Read configuration and headers; no weight is read.

    Args:
        path: of the directory.
        unpack: whether packed weights take the place of what they are stored as, as in a source.

    Raises:
        CheckpointError, UnsupportedModelError: as :func:`open_headers`, or there is no directory.
    """
    if not path.is_dir():
        raise CheckpointError(
            f"{path}: expected a directory with {CONFIG_NAME} and safetensors; there is none."
        )
    return open_headers(str(path), unpack)


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
        if info.dtype not in _SOURCE_DTYPES:
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


def _unpacked(found: Checkpoint) -> Checkpoint:
    """The checkpoint with the tensors of the model in place of those that they are stored as, if
    its weights are packed."""
    packing = find_packing(found.config)
    if packing is None:
        return found
    packed = packing.find(found.tensors)
    names = {part for weight in packed.values() for part in weight.parts.values()}
    tensors = {name: info for name, info in found.tensors.items() if name not in names}
    for name, weight in packed.items():
        known_by = found.tensors[weight.parts[packing.roles[0]]]
        tensors[name] = replace(known_by, dtype=_UNPACKED, shape=weight.shape)
    return replace(
        found,
        config={key: value for key, value in found.config.items() if key != "quantization_config"},
        tensors=tensors,
        packing=packing,
        packed=packed,
        parts={name: found.tensors[name] for name in names},
    )


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
