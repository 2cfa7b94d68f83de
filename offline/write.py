# SPDX-License-Identifier: Apache-2.0
"""Write a checkpoint so that it is either there as a whole or not at all.

Everything goes into a sibling directory ``OUT.partial-XXXXXXXX``: shards as they fill up, then index, side
files and configuration, the manifest last; each file is flushed to disk, then the directory is renamed to OUT.
The writer holds a lock on its partial directory, so a later run knows a dead run's leftovers from a live run.
"""

import errno
import fcntl
import json
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from smoothrot_offline.checkpoint import DTYPES, INDEX_NAME, tensor_digest
from smoothrot_offline.manifest import TensorRecord
from smoothrot_vllm.errors import CheckpointError, ConfigError

_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_SHARD = "shard-{:05d}.safetensors"
_FINAL_SHARD = "model-{:05d}-of-{:05d}.safetensors"


class OutputDirectory:
    """A directory being written: use as a context manager, then :meth:`commit`. Without a commit nothing is left.

    ``removed`` lists the leftovers of dead runs that were cleaned, ``path`` is where to write.

    Raises:
        ConfigError: OUT exists and is not an empty directory, or another run is writing it.
        CheckpointError: the file system refuses (no space, no permission); what was written is removed.
    """

    def __init__(self, out: Path) -> None:
        self._out = out.absolute()
        self.path = self._out.with_name(f"{self._out.name}.partial-{secrets.token_hex(4)}")
        self.removed: list[Path] = []
        self._lock: int | None = None
        self._committed = False

    def __enter__(self) -> Self:
        self._refuse_existing()
        with _writing(self.path):
            self._out.parent.mkdir(parents=True, exist_ok=True)
            self._clean_leftovers()
            self.path.mkdir()
            self._lock = _try_lock(self.path)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if not self._committed:
            shutil.rmtree(self.path, ignore_errors=True)
        if self._lock is not None:
            os.close(self._lock)

    def write_json(self, name: str, content: dict[str, Any]) -> None:
        """Write one JSON file, keys in the order given."""
        self.write_text(name, json.dumps(content, indent=2, ensure_ascii=False) + "\n")

    def write_text(self, name: str, content: str) -> None:
        """Write one UTF-8 file."""
        with _writing(self.path / name):
            (self.path / name).write_text(content, encoding="utf-8")

    def write_tensors(self, name: str, tensors: dict[str, torch.Tensor]) -> None:
        """Write one file in safetensors format."""
        file = self.path / name
        with _writing(file):
            save_file(tensors, file, metadata={"format": "pt"})
            # safetensors makes its files private; a checkpoint has the permissions of any other file.
            file.chmod(0o666 & ~_umask())

    def copy(self, file: Path) -> None:
        """Copy the content of a file, under its name."""
        with _writing(self.path / file.name):
            shutil.copyfile(file, self.path / file.name)

    def commit(self) -> None:
        """Flush every file to disk and give the directory its final name."""
        self._refuse_existing()
        with _writing(self.path):
            for file in sorted(self.path.iterdir()):
                _sync(file)
            _sync(self.path)
            self.path.rename(self._out)
            self._committed = True
            _sync(self._out.parent)

    def _refuse_existing(self) -> None:
        if self._out.exists() and not (self._out.is_dir() and not any(self._out.iterdir())):
            raise ConfigError(
                f"{self._out}: expected no such path or an empty directory. Choose another output, or remove it first."
            )

    def _clean_leftovers(self) -> None:
        pattern = re.compile(re.escape(self._out.name) + r"\.partial-[0-9a-f]{8}")
        for path in sorted(self._out.parent.iterdir()):
            if not pattern.fullmatch(path.name) or path.is_symlink() or not path.is_dir():
                continue
            lock = _try_lock(path)
            if lock is None:
                raise ConfigError(
                    f"{path}: another conversion into {self._out} is running, or its file system has no locks. Wait for it, or "
                    "remove the directory if no conversion runs."
                )
            shutil.rmtree(path)
            os.close(lock)
            self.removed.append(path)


class ShardWriter:
    """Collects tensors into safetensors shards of a limited size, so that no more than one shard is held in memory.

    ``records`` describes every tensor added, in order.
    """

    def __init__(self, directory: OutputDirectory, limit: int) -> None:
        self._directory = directory
        self._limit = limit
        self._pending: dict[str, torch.Tensor] = {}
        self._shards: list[list[str]] = []
        self.records: dict[str, TensorRecord] = {}
        self.total_bytes = 0

    def add(self, tensors: dict[str, torch.Tensor]) -> None:
        """Queue tensors under their full names; a full shard is written at once."""
        for name, tensor in tensors.items():
            if self._pending and self._pending_bytes() + tensor.nbytes > self._limit:
                self._flush()
            self._pending[name] = tensor.contiguous()
            self.total_bytes += tensor.nbytes

    def finish(self) -> None:
        """Write the last shard, give every shard its final name, and write the index."""
        self._flush()
        count = len(self._shards)
        weight_map = {}
        with _writing(self._directory.path):
            for number, names in enumerate(self._shards, start=1):
                file = _FINAL_SHARD.format(number, count)
                (self._directory.path / _SHARD.format(number)).rename(self._directory.path / file)
                for name in names:
                    weight_map[name] = file
                    self.records[name] = self.records[name].model_copy(update={"file": file})
        index = {"metadata": {"total_size": self.total_bytes}, "weight_map": dict(sorted(weight_map.items()))}
        self._directory.write_json(INDEX_NAME, index)

    def _pending_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self._pending.values())

    def _flush(self) -> None:
        if not self._pending:
            return
        file = _SHARD.format(len(self._shards) + 1)
        self._directory.write_tensors(file, self._pending)
        for name, tensor in self._pending.items():
            self.records[name] = TensorRecord(
                file=file, dtype=_DTYPE_NAMES[tensor.dtype], shape=list(tensor.shape), sha256=tensor_digest(tensor)
            )
        self._shards.append(list(self._pending))
        self._pending.clear()


def _try_lock(path: Path) -> int | None:
    """Descriptor of a directory locked for this process, or None if another process holds it (or locks do not work here)."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    """Turn what the file system and safetensors raise into one clear error."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = " ".join(str(error).split())
        full = (isinstance(error, OSError) and error.errno == errno.ENOSPC) or "No space left" in reason
        advice = "Free some space or choose another disk" if full else "Check the disk and its permissions"
        raise CheckpointError(
            f"{path}: the output could not be written: {reason}. {advice}; what was written has been removed."
        ) from error
