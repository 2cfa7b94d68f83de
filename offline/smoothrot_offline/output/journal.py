# SPDX-License-Identifier: Apache-2.0
"""The journal of a conversion: what is finished, so that a run that was killed goes on where it
stopped.

One JSON object a line, flushed to disk before anything relies on it. The first line says what is
converted and how; the others name a finished piece of work, its file, and the SHA-256 of it or of
each tensor in it. A torn last line is work that was not finished.
"""

import json
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from smoothrot_offline import ranks
from smoothrot_offline.config import ConvertConfig
from smoothrot_offline.decide.stages import Decisions
from smoothrot_offline.device import CPU, device_kind
from smoothrot_offline.output.decisions import pack_decisions, record_or_none, unpack_decisions
from smoothrot_offline.output.directory import (
    JOURNAL_NAME,
    OutputDirectory,
    describe,
    part_name,
    write_part,
    write_tensors,
    writing,
)
from smoothrot_offline.output.manifest import (
    DistillationRecord,
    LayerRecord,
    TensorRecord,
    package_versions,
)
from smoothrot_offline.source.checkpoint import Checkpoint, file_digest
from smoothrot_offline.source.family import ModelSpec
from smoothrot_offline.source.headers import CONFIG_NAME, WORK_PREFIX
from smoothrot_vllm.errors import CheckpointError, ResumeError
from smoothrot_vllm.foreign_files import parse_json, read_tensors

_FILE = re.compile(WORK_PREFIX + r"[\w-]{1,64}\.safetensors")


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
        # Sums are split over threads and ranks, and kernels differ by instruction set and device:
        # each can change a last bit.
        "machine": {
            "device": device_kind(checkpoint.device),
            "threads": torch.get_num_threads(),
            "workers": workers,
            "ranks": ranks.count(),
            "instructions": torch.backends.cpu.get_cpu_capability(),
        },
    }


class Journal:
    """Reads the journal of a directory, or begins it; records each finished piece of work.

    ``tensors`` describes what the finished parts of the model hold, in order; ``layers`` are the
    records of those of them that are decoder layers.

    Args:
        directory: the output, locked.
        identity: of this conversion, from :func:`conversion_identity`.
        parts: how many files the output's weights are in.

    Raises:
        ResumeError: the directory holds another conversion's work, or its files are not those that
            were written.
    """

    def __init__(
        self, directory: OutputDirectory, identity: Mapping[str, Mapping[str, Any]], parts: int
    ) -> None:
        self._directory = directory
        self.folder = directory.path
        self._path = directory.path / JOURNAL_NAME
        self._count = parts
        self._finished = 0
        self._decisions: dict[str, Any] | None = None
        self._hidden: dict[str, str] | None = None
        self._distillation: dict[str, Any] | None = None
        self.layers: list[LayerRecord] = []
        self.tensors: dict[str, TensorRecord] = {}
        self.done = False
        entries = self._read()
        if len(entries) < 2:
            self._path.unlink(missing_ok=True)
            self._append({"identity": identity})
            return
        self._check(entries[0].get("identity"), identity)
        self.done = "done" in entries[-1]
        self._replaced = any("distillation" in entry for entry in entries)
        try:
            for entry in entries[1:]:
                self._replay(entry)
        except (KeyError, TypeError, ValueError, AttributeError) as error:  # or a ValidationError
            reason = " ".join(repr(error).split())
            raise ResumeError(
                f"{self._path}: expected finished pieces of work: {reason}. {self._advice()}"
            ) from error

    @property
    def decided(self) -> bool:
        """Whether it holds decisions."""
        return self._decisions is not None

    @property
    def begun(self) -> bool:
        """Whether a part is finished: the first is the embedding."""
        return self._finished > 0

    def finish_decisions(self, found: Decisions) -> None:
        """Keep what was decided on a calibrated model."""
        facts, tensors = pack_decisions(found)
        self._decisions = {"decisions": facts, **self._keep("decisions", tensors)}
        self._append(self._decisions)

    def load_decisions(
        self, spec: ModelSpec, config: ConvertConfig, device: torch.device = CPU
    ) -> Decisions:
        """What :meth:`finish_decisions` kept, of a model and its options, on a device.

        Raises:
            ResumeError: it is not of that form.
        """
        assert self._decisions is not None
        kept = self._load(self._decisions).items()
        tensors = {name: tensor.to(device) for name, tensor in kept}
        try:
            return unpack_decisions(self._decisions["decisions"], tensors, spec, config)
        except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
            reason = " ".join(repr(error).split())
            raise ResumeError(
                f"{self._path}: decisions: expected what an interrupted conversion wrote: {reason}."
                f" {self._advice()}"
            ) from error

    def write_part(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, TensorRecord]:
        """Write the next part; it counts when :meth:`finish_part` has recorded it."""
        return write_part(self.folder, self._finished + 1, self._count, tensors)

    def finish_part(
        self,
        tensors: dict[str, TensorRecord],
        layer: LayerRecord | None = None,
        hidden: dict[str, torch.Tensor] | None = None,
    ) -> None:
        """Record a part that is in its file, the decoder layer that it is, and the hidden states
        that the next layer reads, if any."""
        before = self._hidden
        self._hidden = self._keep(f"hidden-{self._finished:05d}", hidden) if hidden else None
        self._append(
            {
                "tensors": {name: record.model_dump() for name, record in tensors.items()},
                "layer": layer and layer.model_dump(mode="json"),
                "hidden": self._hidden,
            }
        )
        self._add(tensors, layer)
        if before is not None:
            (self.folder / before["file"]).unlink(missing_ok=True)

    def load_hidden(self) -> dict[str, torch.Tensor]:
        """Hidden states after the last finished layer; none if there are none."""
        return {} if self._hidden is None else self._load(self._hidden)

    @property
    def distilled(self) -> bool:
        """Whether it holds what distillation led to."""
        return self._distillation is not None

    def finish_distillation(
        self, record: DistillationRecord, changed: dict[str, torch.Tensor]
    ) -> None:
        """Keep what distillation led to."""
        kept = self._keep("distillation", changed)
        self._distillation = {"distillation": record.model_dump(), **kept}
        self._append(self._distillation)

    def apply_distillation(
        self, tensors: Mapping[str, TensorRecord]
    ) -> tuple[DistillationRecord, dict[str, TensorRecord]]:
        """Replace tensors of the parts, ``tensors``, by those that :meth:`finish_distillation`
        kept; done again, it changes nothing.

        Raises:
            ResumeError: a part is not the one that was written.
        """
        assert self._distillation is not None
        changed = self._load(self._distillation)
        found: dict[str, TensorRecord] = {}
        for file in dict.fromkeys(record.file for record in tensors.values()):
            expected = {name: record for name, record in tensors.items() if record.file == file}
            part = self._read_work(file)
            same = {name: tensor for name, tensor in part.items() if name not in changed}
            if part.keys() != expected.keys() or any(
                record != expected[name] for name, record in describe(same, file).items()
            ):
                raise self._other_file(file)
            whole = {name: changed.get(name, part[name]) for name in expected}
            with writing(self.folder / file):
                work = self.folder / f"{WORK_PREFIX}{file}"
                write_tensors(work, whole)
                work.rename(self.folder / file)
            found |= describe(whole, file)
        return DistillationRecord.model_validate(self._distillation["distillation"]), found

    def finish(self) -> None:
        """Everything is written: only the directory's name, and that of its configuration, are
        left to change."""
        self._append({"done": True})

    def clear_work(self) -> None:
        """Remove every file that only serves to go on, but the journal."""
        for file in self.folder.glob(f"{WORK_PREFIX}*"):
            if file.name != JOURNAL_NAME:
                file.unlink()

    def _add(self, tensors: dict[str, TensorRecord], layer: LayerRecord | None) -> None:
        self._finished += 1
        self.tensors |= tensors
        if layer is not None:
            self.layers.append(layer)

    def _keep(self, name: str, tensors: dict[str, torch.Tensor]) -> dict[str, str]:
        """Write a file of unfinished work: its name under ``file``, its SHA-256 under
        ``sha256``."""
        path = self.folder / f"{WORK_PREFIX}{name}.safetensors"
        with writing(path):
            write_tensors(path, tensors)
        return {"file": path.name, "sha256": file_digest(path)}

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
        if "decisions" in entry:
            self._decisions = _kept(entry)
        elif "tensors" in entry:
            records = {
                name: TensorRecord.model_validate(record)
                for name, record in entry["tensors"].items()
            }
            self._hidden = None if entry["hidden"] is None else _kept(entry["hidden"])
            if not self.done and not self._replaced:
                self._check_part(records)
            self._add(records, record_or_none(LayerRecord, entry["layer"]))
        elif "distillation" in entry:
            self._distillation = _kept(entry)
        elif "done" not in entry:
            raise ValueError(f"unknown piece of work {', '.join(entry)}")

    def _check_part(self, records: dict[str, TensorRecord]) -> None:
        file = part_name(self._finished + 1, self._count)
        if {record.file for record in records.values()} != {file}:
            raise ValueError(f"expected tensors of {file}")
        found = describe(self._read_work(file), file)
        if found != records:
            raise self._other_file(file)

    def _load(self, kept: Mapping[str, str]) -> dict[str, torch.Tensor]:
        path = self.folder / kept["file"]
        if not path.is_file() or file_digest(path) != kept["sha256"]:
            raise self._other_file(kept["file"])
        return self._read_work(kept["file"])

    def _read_work(self, file: str) -> dict[str, torch.Tensor]:
        if not (self.folder / file).is_file():
            raise self._other_file(file)
        try:
            return read_tensors(self.folder / file, self._advice())
        except CheckpointError as error:
            raise ResumeError(str(error)) from error

    def _other_file(self, file: str) -> ResumeError:
        return ResumeError(
            f"{self.folder / file}: expected the file that was written, got another or none."
            f" {self._advice()}"
        )

    def _append(self, entry: Mapping[str, Any]) -> None:
        with writing(self._path), self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self._directory.resumable = "identity" not in entry

    def _advice(self) -> str:
        return f"remove {self._directory.path} to start over, or choose another output."


def _kept(entry: dict[str, Any]) -> dict[str, Any]:
    """The entry, if the file it names is one of the work folder: files are removed by these
    names."""
    if not (_FILE.fullmatch(entry["file"]) and isinstance(entry["sha256"], str)):
        raise ValueError(
            f"expected a plain file name and a SHA-256, got {entry['file']!r}, {entry['sha256']!r}"
        )
    return entry
