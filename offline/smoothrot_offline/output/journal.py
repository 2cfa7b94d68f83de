# SPDX-License-Identifier: Apache-2.0
"""The journal of a conversion: what is finished, so that a run that was killed goes on where it
stopped.

One JSON object a line, flushed to disk before anything relies on it. The first line says what is
converted and how; the others name a finished piece of work with the file that holds it and its
SHA-256. A torn last line is work that was not finished.
"""

import json
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from smoothrot_offline.config import ConvertConfig
from smoothrot_offline.device import device_kind
from smoothrot_offline.output.directory import JOURNAL_NAME, OutputDirectory, write_tensors, writing
from smoothrot_offline.output.manifest import LayerRecord, TensorRecord, package_versions
from smoothrot_offline.source.checkpoint import Checkpoint, file_digest
from smoothrot_offline.source.headers import CONFIG_NAME, WORK_PREFIX
from smoothrot_vllm.errors import CheckpointError, ResumeError
from smoothrot_vllm.foreign_files import parse_json, read_tensors

_FILE = re.compile(r"[\w-]{1,64}\.safetensors")
KeptFile = dict[str, str]
"""A file of finished work: its name under ``file``, its SHA-256 under ``sha256``."""


def keep_layer(folder: Path, index: int, tensors: dict[str, torch.Tensor]) -> KeptFile:
    """Write the output tensors of a finished layer into a work folder.

    Raises:
        OutputError: the file system refuses.
    """
    return _keep(folder, f"layer-{index:05d}", tensors)


def _keep(folder: Path, name: str, tensors: dict[str, torch.Tensor]) -> KeptFile:
    path = folder / f"{WORK_PREFIX}{name}.safetensors"
    with writing(path):
        write_tensors(path, tensors)
    return {"file": path.name, "sha256": file_digest(path)}


def conversion_identity(
    checkpoint: Checkpoint, side_files: Iterable[Path], config: ConvertConfig, workers: int
) -> dict[str, dict[str, Any]]:
    """Everything that the bytes of a conversion follow from, by field: a conversion goes on only if
    all of it is the same.

    Raises:
        CheckpointError: a file of the source cannot be read.
    """
    names = [CONFIG_NAME, *checkpoint.files, *map(str, side_files)]
    text = Path(config.calib)
    return {
        "source": {name: file_digest(checkpoint.path / name) for name in names},
        "options": config.model_dump(mode="json", exclude={"calib"}),
        "calibration": {"text": file_digest(text) if text.is_file() else config.calib},
        "versions": package_versions(),
        # Sums are split over threads, and kernels differ by instruction set and device: each can
        # change a last bit.
        "machine": {
            "device": device_kind(checkpoint.device),
            "threads": torch.get_num_threads(),
            "workers": workers,
            "instructions": torch.backends.cpu.get_cpu_capability(),
        },
    }


class Journal:
    """Reads the journal of a directory, or begins it; records each finished piece of work.

    ``layers`` are the records of the decoder layers that are finished, ``shards`` the tensors of
    each whole shard.

    Args:
        directory: the output, locked.
        identity: of this conversion, from :func:`conversion_identity`.

    Raises:
        ResumeError: the directory holds another conversion's work, or its files are not those that
            were written.
    """

    def __init__(
        self, directory: OutputDirectory, identity: Mapping[str, Mapping[str, Any]]
    ) -> None:
        self._directory = directory
        self.folder = directory.path
        self._path = directory.path / JOURNAL_NAME
        self.layers: list[LayerRecord] = []
        self.shards: list[dict[str, TensorRecord]] = []
        self.done = False
        self.decisions: dict[str, Any] | None = None
        self._layer_entries: list[dict[str, Any]] = []
        entries = self._read()
        if len(entries) < 2:
            self._path.unlink(missing_ok=True)
            self._append({"identity": identity})
            return
        self._check(entries[0].get("identity"), identity)
        # Then the files have their final names, and none is to be written again.
        self.done = "done" in entries[-1]
        try:
            for entry in entries[1:]:
                self._replay(entry)
        except (
            KeyError,
            TypeError,
            ValueError,
            AttributeError,
        ) as error:  # ValidationError is a ValueError
            reason = " ".join(repr(error).split())
            raise ResumeError(
                f"{self._path}: expected finished pieces of work: {reason}. {self._advice()}"
            ) from error

    def finish_decisions(self, facts: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
        """Keep what :func:`~smoothrot_offline.decide.stages.decide` found."""
        self.decisions = {"decisions": facts, **_keep(self._directory.path, "decisions", tensors)}
        self._append(self.decisions)

    def load_decisions(self) -> dict[str, torch.Tensor]:
        """The tensors of the finished decisions."""
        assert self.decisions is not None
        return self._load(self.decisions)

    def finish_layer(
        self,
        index: int,
        record: LayerRecord,
        stored: dict[str, torch.Tensor],
        hidden: dict[str, torch.Tensor],
    ) -> None:
        """Keep a finished layer: its output tensors, and the hidden states that the next one
        reads, if any."""
        folder = self._directory.path
        kept = keep_layer(folder, index, stored)
        self.adopt_layer(
            record,
            list(stored),
            kept,
            _keep(folder, f"hidden-{index:05d}", hidden) if hidden else None,
        )
        if index and hidden:
            self._drop(self._layer_entries[index - 1]["hidden"]["file"])

    def adopt_layer(
        self, record: LayerRecord, names: list[str], kept: KeptFile, hidden: KeptFile | None = None
    ) -> None:
        """Record the next layer, whose tensors ``names`` are in a file that :func:`keep_layer`
        wrote."""
        entry = {
            "layer": record.model_dump(mode="json"),
            "tensors": names,
            **kept,
            "hidden": hidden,
        }
        self._append(entry)
        self.layers.append(record)
        self._layer_entries.append(entry)

    def load_layer(self, index: int) -> dict[str, torch.Tensor]:
        """Output tensors of a finished layer; none if all of them are in whole shards."""
        entry = self._layer_entries[index]
        if self._in_shards(entry):
            return {}
        stored = self._load(entry)
        if stored.keys() != set(entry["tensors"]):
            raise ResumeError(
                f"{self._path}: layer {index}: expected the tensors of {entry['file']}."
                f" {self._advice()}"
            )
        # A file's tensors come in another order, which would move the limits of shards.
        return {name: stored[name] for name in entry["tensors"]}

    def load_hidden(self) -> dict[str, torch.Tensor]:
        """Hidden states after the last finished layer; none if there are none."""
        if not self._layer_entries or self._layer_entries[-1]["hidden"] is None:
            return {}
        return self._load(self._layer_entries[-1]["hidden"])

    def finish_shard(self, file: str, records: dict[str, TensorRecord]) -> None:
        """Record a whole shard, and drop the layers that it makes superfluous."""
        tensors = {name: record.model_dump(mode="json") for name, record in records.items()}
        self._append(
            {"shard": tensors, "file": file, "sha256": file_digest(self._directory.path / file)}
        )
        self.shards.append(records)
        for entry in self._layer_entries:
            if self._in_shards(entry):
                self._drop(entry["file"])

    def finish(self) -> None:
        """Everything is written: only the directory's name, and that of its configuration, are
        left to change."""
        self._append({"done": True})

    def clear_work(self) -> None:
        """Remove every file that only serves to go on, but the journal."""
        for file in self._directory.path.glob(f"{WORK_PREFIX}*"):
            if file.name != JOURNAL_NAME:
                file.unlink()

    def _in_shards(self, entry: dict[str, Any]) -> bool:
        return all(any(name in shard for shard in self.shards) for name in entry["tensors"])

    def _read(self) -> list[dict[str, Any]]:
        if not self._path.exists():
            return []
        with writing(self._path):
            data = self._path.read_bytes()
            whole = data[: data.rfind(b"\n") + 1]
            # From here on a refusal keeps what is there: it may be another conversion's.
            self._directory.resumed = whole.count(b"\n") > 1
            if whole != data:
                os.truncate(self._path, len(whole))
        try:
            entries = [parse_json(line) for line in whole.splitlines()]
        except ValueError as error:
            raise ResumeError(
                f"{self._path}: expected one JSON object a line: {error}. {self._advice()}"
            ) from error
        if not all(isinstance(entry, dict) for entry in entries):
            raise ResumeError(f"{self._path}: expected one JSON object a line. {self._advice()}")
        return entries

    def _check(self, before: Any, now: Mapping[str, Mapping[str, Any]]) -> None:
        if (
            not isinstance(before, dict)
            or before.keys() != now.keys()
            or not all(isinstance(part, dict) for part in before.values())
        ):
            raise ResumeError(
                f"{self._path}: expected fields {', '.join(now)} in its first line."
                f" {self._advice()}"
            )
        # The journal has been through JSON.
        wanted = json.loads(json.dumps(now))
        for part, fields in wanted.items():
            for field in sorted({*fields, *before[part]}):
                old, new = before[part].get(field), fields.get(field)
                if old != new:
                    raise ResumeError(
                        f"{self._path}: {part}: {field}: the conversion that was interrupted had"
                        f" {old!r}, this one has {new!r}. Run the same command on the same source,"
                        f" or start over: {self._advice()}"
                    )

    def _replay(self, entry: dict[str, Any]) -> None:
        for kept in (
            () if "done" in entry else (entry, entry["hidden"] if "layer" in entry else None)
        ):
            # Files are renamed and removed by these names.
            if kept is not None and not (
                _FILE.fullmatch(kept["file"]) and isinstance(kept["sha256"], str)
            ):
                raise ValueError(
                    f"expected a plain file name and a SHA-256, got {kept['file']!r},"
                    f" {kept['sha256']!r}"
                )
        if "decisions" in entry:
            self.decisions = entry
        elif "layer" in entry:
            if not isinstance(entry["tensors"], list) or not all(
                isinstance(name, str) for name in entry["tensors"]
            ):
                raise ValueError(f"expected names of tensors, got {entry['tensors']!r}")
            self.layers.append(LayerRecord.model_validate(entry["layer"]))
            self._layer_entries.append(entry)
        elif "shard" in entry and not self.done:
            number = len(self.shards) + 1
            # Whole shards get their final names one after the other: the run may have been killed
            # in between.
            for renamed in self._directory.path.glob(f"model-{number:05d}-of-*.safetensors"):
                if not (self._directory.path / entry["file"]).exists():
                    renamed.rename(self._directory.path / entry["file"])
            self._check_file(entry)
            self.shards.append(
                {
                    name: TensorRecord.model_validate(record)
                    for name, record in entry["shard"].items()
                }
            )

    def _load(self, entry: Mapping[str, Any]) -> dict[str, torch.Tensor]:
        self._check_file(entry)
        path = self._directory.path / entry["file"]
        try:
            return read_tensors(path, self._advice())
        except CheckpointError as error:
            raise ResumeError(str(error)) from error

    def _check_file(self, entry: Mapping[str, Any]) -> None:
        path = self._directory.path / entry["file"]
        if not path.is_file() or file_digest(path) != entry["sha256"]:
            raise ResumeError(
                f"{path}: expected the file that was written, got another or none. {self._advice()}"
            )

    def _drop(self, file: str) -> None:
        (self._directory.path / file).unlink(missing_ok=True)

    def _append(self, entry: Mapping[str, Any]) -> None:
        with writing(self._path), self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self._directory.resumable = "identity" not in entry

    def _advice(self) -> str:
        return f"remove {self._directory.path} to start over, or choose another output."
