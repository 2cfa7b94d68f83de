# SPDX-License-Identifier: Apache-2.0
"""Write a checkpoint so that it is either there as a whole or not at all.

Everything goes into a sibling directory, ``OUT.partial``, or ``OUT.partial-XXXXXXXX`` where nothing
can be resumed: a file for each part of the model, then index, side files and configuration, the
manifest last; each file is flushed to disk, then the directory is renamed to OUT. An empty
directory OUT may be a mount point, which nothing can be renamed to: it is filled itself, and has
its ``config.json`` under another name until it is whole. The writer locks what it writes into, so a
later run knows a dead run's leftovers from a live run.
"""

import errno
import fcntl
import json
import os
import re
import secrets
import shutil
import socket
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from smoothrot_offline.output.manifest import TensorRecord
from smoothrot_offline.source.checkpoint import DTYPES, file_digest, tensor_digest
from smoothrot_offline.source.headers import CONFIG_NAME, INDEX_NAME, WORK_PREFIX
from smoothrot_vllm.errors import ConfigError, DeviceMemoryError, OutputError, SmoothRotError

_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
JOURNAL_NAME = f"{WORK_PREFIX}journal.jsonl"
_HOLDER = f"{WORK_PREFIX}holder.txt"
_INCOMPLETE = ".incomplete"
_OF_FILE_SYSTEM = "lost+found"
"""A folder that the root of a file system has, empty or not."""


class OutputDirectory:
    """A directory being written: use as a context manager, then :meth:`commit`. Without a commit
    nothing is left.

    ``removed`` lists the leftovers of dead runs that were cleaned, ``path`` is where to write.

    Raises:
        ConfigError: OUT exists and is not an empty directory, or another run is writing it.
        OutputError: the file system refuses (no space, no permission); what was written is removed.
    """

    _tolerated: tuple[str, ...] = (_OF_FILE_SYSTEM,)
    """Names that OUT may hold and count as empty."""

    def __init__(self, out: Path) -> None:
        self._out = out.resolve()
        self.path = self._out
        self.removed: list[Path] = []
        self._lock: int | None = None
        self._committed = False

    def __enter__(self) -> Self:
        self._refuse_existing()
        parent = self._out if self._out.is_dir() else self._out.parent
        self.path = parent / f"{self._out.name}.partial-{secrets.token_hex(4)}"
        with writing(self.path):
            parent.mkdir(parents=True, exist_ok=True)
            self._clean_leftovers(parent)
            self.path.mkdir()
            self._lock = _try_lock(self.path)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if not self._committed:
            shutil.rmtree(self.path, ignore_errors=True)
        if self._lock is not None:
            os.close(self._lock)

    def write_json(self, name: str, content: dict[str, Any]) -> None:
        """Write one JSON file, keys in the order given."""
        self.write_text(name, json.dumps(content, indent=2, ensure_ascii=False) + "\n")

    def write_text(self, name: str, content: str) -> None:
        """Write one UTF-8 file."""
        with writing(self.path / name):
            (self.path / name).write_text(content, encoding="utf-8")

    def write_tensors(self, name: str, tensors: dict[str, torch.Tensor]) -> None:
        """Write one file in safetensors format."""
        with writing(self.path / name):
            write_tensors(self.path / name, tensors)

    def copy(self, source: Path, file: Path) -> None:
        """Copy the content of ``file``, a path relative to the directory ``source``, to the same
        place in this one."""
        with writing(self.path / file):
            (self.path / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source / file, self.path / file)

    def commit(self) -> None:
        """Flush every file to disk and give the directory its final name."""
        self._refuse_existing()
        with writing(self.path):
            self._sync_all()
            if self.path.parent == self._out:
                for file in sorted(self.path.iterdir()):
                    file.rename(self._out / file.name)
                self.path.rmdir()
            else:
                self.path.rename(self._out)
            self._committed = True
            _sync(self._out)
            _sync(self._out.parent)

    def _sync_all(self) -> None:
        for file in self._files():
            _sync(file)
        _sync(self.path)

    def _files(self) -> list[Path]:
        """Every file that was written, sorted."""
        return sorted(
            path
            for entry in self._entries()
            for path in (entry, *entry.rglob("*"))
            if path.is_file()
        )

    def _entries(self) -> list[Path]:
        return [entry for entry in self.path.iterdir() if entry.name != _OF_FILE_SYSTEM]

    def _refuse_existing(self) -> None:
        if not self._out.exists():
            return
        if not self._out.is_dir() or any(
            entry.name not in self._tolerated and not self._leftover.fullmatch(entry.name)
            for entry in self._out.iterdir()
        ):
            raise ConfigError(
                f"{self._out}: expected no such path or an empty directory. Choose another output,"
                " or remove it first."
            )

    @property
    def _leftover(self) -> re.Pattern[str]:
        return re.compile(re.escape(self._out.name) + r"\.partial-[0-9a-f]{8}")

    def _clean_leftovers(self, parent: Path) -> None:
        for path in sorted(parent.iterdir()):
            if not self._leftover.fullmatch(path.name) or path.is_symlink() or not path.is_dir():
                continue
            lock = _try_lock(path)
            if lock is None:
                raise ConfigError(
                    f"{path}: another conversion into {self._out} is running, or its file system"
                    " has no locks. Wait for it, or remove the directory if no conversion runs."
                )
            shutil.rmtree(path)
            os.close(lock)
            self.removed.append(path)


class ResumableDirectory(OutputDirectory):
    """An output that an interrupted run leaves as ``OUT.partial``, or in OUT if that was there, and
    that the next goes on with.

    Its ``config.json``, without which nothing opens it, has another name until the directory has
    its own. ``resumable`` is to be set when there is something worth keeping, ``resumed`` when it
    was there before. A refusal of a source that was begun in this run leaves nothing.
    """

    _tolerated = (_OF_FILE_SYSTEM, JOURNAL_NAME, _HOLDER)

    def __init__(self, out: Path) -> None:
        super().__init__(out)
        self.resumable = False
        self.resumed = False

    def __enter__(self) -> Self:
        begun = unfinished_output(self._out)
        # A journal in OUT itself may also be that of a run that was killed while it gave the files
        # their final names.
        if begun != self._out:
            self._refuse_existing()
        self.path = begun or (self._out if self._out.is_dir() else _partial(self._out))
        with writing(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            strangers = [
                entry.name for entry in self._entries() if entry.name not in (JOURNAL_NAME, _HOLDER)
            ]
            if strangers and begun is None:
                raise ConfigError(
                    f"{self.path}: expected the work of an interrupted conversion, got"
                    f" {strangers[0]} and no {JOURNAL_NAME}. Choose another output, or remove it"
                    " first."
                )
            self._lock = _try_lock(self.path)
            if self._lock is None:
                holder = self.path / _HOLDER
                who = (
                    holder.read_text(encoding="utf-8").strip()
                    if holder.is_file()
                    else "another process"
                )
                raise ConfigError(
                    f"{self.path}: {who} is converting into {self._out}, or its file system has no"
                    " locks. Wait for it, or choose another output."
                )
            if not self.path.exists() or os.fstat(self._lock).st_ino != self.path.stat().st_ino:
                os.close(self._lock)
                raise ConfigError(
                    f"{self._out}: another conversion into it has ended just now. Run the command"
                    " again."
                )
            (self.path / _HOLDER).write_text(
                f"process {os.getpid()} on {socket.gethostname()}\n", encoding="utf-8"
            )
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        refused = isinstance(error, SmoothRotError) and not isinstance(
            error, OutputError | DeviceMemoryError
        )
        keep = self.resumed or (self.resumable and not refused)
        if not self._committed and not keep:
            self._remove()
        if self._lock is not None:
            (self.path / _HOLDER).unlink(missing_ok=True)
            os.close(self._lock)

    def _remove(self) -> None:
        if self.path != self._out:
            shutil.rmtree(self.path, ignore_errors=True)
            return
        for entry in self._entries():
            (
                shutil.rmtree(entry, ignore_errors=True)
                if entry.is_dir()
                else entry.unlink(missing_ok=True)
            )

    def write_json(self, name: str, content: dict[str, Any]) -> None:
        """Write one JSON file, keys in the order given; ``config.json`` under a name that
        nothing opens."""
        super().write_json(name + _INCOMPLETE if name == CONFIG_NAME else name, content)

    def digests(self) -> dict[str, str]:
        """SHA-256 of each file that holds no weights, by its final name."""
        files = [
            file
            for file in self._files()
            if file.suffix != ".safetensors" and not file.name.startswith(WORK_PREFIX)
        ]
        return {
            str(file.relative_to(self.path)).removesuffix(_INCOMPLETE): file_digest(file)
            for file in files
        }

    @contextmanager
    def openable(self) -> Iterator[Path]:
        """A folder of links to what is written, with the name for the configuration that makes it
        a model, while the context lasts."""
        with tempfile.TemporaryDirectory(prefix="smoothrot-") as folder:
            for file in self._entries():
                (Path(folder) / file.name.removesuffix(_INCOMPLETE)).symlink_to(file)
            yield Path(folder)

    def flush(self) -> None:
        """Flush every file to disk."""
        with writing(self.path):
            self._sync_all()

    def commit(self) -> None:
        """Give the directory its name, then its configuration, which makes it a model; then drop
        the journal."""
        with writing(self.path):
            if self.path != self._out:
                self._refuse_existing()
                self.path.rename(self._out)
                self.path = self._out
                _sync(self._out.parent)
            incomplete = self._out / (CONFIG_NAME + _INCOMPLETE)
            if incomplete.exists():
                incomplete.rename(self._out / CONFIG_NAME)
                _sync(self._out)
            self._committed = True
            (self._out / _HOLDER).unlink(missing_ok=True)
            (self._out / JOURNAL_NAME).unlink()
            _sync(self._out)


def unfinished_output(out: Path) -> Path | None:
    """Where an interrupted conversion into ``out`` has left its work, or None."""
    out = out.resolve()
    places = (out, _partial(out)) if out.name else (out,)
    return next((place for place in places if (place / JOURNAL_NAME).is_file()), None)


def _partial(out: Path) -> Path:
    return out.with_name(f"{out.name}.partial")


def part_name(number: int, count: int) -> str:
    """File of part ``number`` of ``count``, from 1: the embedding, each decoder layer, the final
    norm with the head."""
    return f"model-{number:05d}-of-{count:05d}.safetensors"


def write_part(
    folder: Path, number: int, count: int, tensors: Mapping[str, torch.Tensor]
) -> dict[str, TensorRecord]:
    """Write one part under its final name, and describe its tensors in the order given.

    Raises:
        OutputError: the file system refuses.
    """
    file = part_name(number, count)
    whole = {name: tensor.contiguous().cpu() for name, tensor in tensors.items()}
    with writing(folder / file):
        write_tensors(folder / file, whole)
    return describe(whole, file)


def describe(tensors: Mapping[str, torch.Tensor], file: str) -> dict[str, TensorRecord]:
    """The manifest's entries for tensors on the CPU that are in ``file``."""
    return {
        name: TensorRecord(
            file=file,
            dtype=_DTYPE_NAMES[tensor.dtype],
            shape=list(tensor.shape),
            sha256=tensor_digest(tensor),
        )
        for name, tensor in tensors.items()
    }


def write_index(directory: OutputDirectory, records: Mapping[str, TensorRecord]) -> None:
    """Write the index of all parts."""
    total = sum(record.nbytes for record in records.values())
    files = {name: record.file for name, record in sorted(records.items())}
    directory.write_json(INDEX_NAME, {"metadata": {"total_size": total}, "weight_map": files})


def write_tensors(file: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Write contiguous tensors, wherever they are, to a safetensors file and flush it to disk."""
    save_file(
        {name: tensor.cpu() for name, tensor in tensors.items()}, file, metadata={"format": "pt"}
    )
    # safetensors makes its files private; a checkpoint has the permissions of any other file.
    file.chmod(0o666 & ~_umask())
    _sync(file)


def _try_lock(path: Path) -> int | None:
    """Descriptor of a directory locked for this process, or None if another process holds it (or
    locks do not work here)."""
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
def writing(path: Path) -> Iterator[None]:
    """Turn what the file system and safetensors raise into one clear error."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = " ".join(str(error).split())
        full = getattr(error, "errno", None) == errno.ENOSPC or "No space left" in reason
        advice = (
            "Free some space or choose another disk"
            if full
            else "Check the disk and its permissions"
        )
        raise OutputError(
            f"{path}: the output could not be written: {reason}. {advice}; the same command then"
            " goes on from the last finished layer, if there is one."
        ) from error
