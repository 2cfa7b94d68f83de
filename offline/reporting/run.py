# SPDX-License-Identifier: Apache-2.0
"""The comparison: each directory's size, then its accuracy with its model alone in memory, then
all speeds side by side."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from smoothrot_offline.checkpoint import Checkpoint, open_checkpoint
from smoothrot_offline.evaluate import TextWindows, measure_perplexity, run_dtype, text_windows
from smoothrot_offline.foreign_models import quantization_method, sixteen_bit_bytes
from smoothrot_offline.inspect import inspect
from smoothrot_offline.manifest import package_versions
from smoothrot_offline.model import load_model
from smoothrot_offline.progress import ProgressCallback, no_progress
from smoothrot_offline.reporting.record import (
    DirectoryRecord,
    PerplexityRecord,
    Report,
    ReportConfig,
    SizeRecord,
    SpeedRecord,
)
from smoothrot_offline.reporting.speed import check_context, measure_speed, speed_conditions
from smoothrot_offline.reporting.tasks import Tasks
from smoothrot_vllm.errors import ConfigError
from smoothrot_vllm.format import QUANT_METHOD


def compare(
    directories: Sequence[Path], config: ReportConfig, progress: ProgressCallback = no_progress
) -> Report:
    """Measure what ``config`` asks for of every directory.

    Everything that can be refused from headers, texts and task files is, before a model runs. With
    ``config.speed`` all the models are in memory at once.

    Raises:
        ConfigError: a directory or a text's name given twice, an unreadable text, an unknown task,
            more tokens than a context.
        CheckpointError: a directory is damaged.
        ConfigError: a directory is quantised by a method whose package is not installed.
    """
    paths = list(directories)
    _refuse_repeated("directories", [str(path.resolve()) for path in paths])
    _refuse_repeated("--text: files of different names", [Path(text).name for text in config.texts])
    sizes = {path: _size(open_checkpoint(path)) for path in paths}
    if config.speed:
        for path in paths:
            check_context(path, config.prompt_tokens, config.new_tokens)
    texts = {path: _texts(path, config) for path in paths}
    tasks = Tasks(config.tasks, config.include_path) if config.tasks else None
    records = []
    for number, path in enumerate(paths):
        progress(f"{path}", number, len(paths))
        records.append(_measure(path, sizes[path], texts[path], tasks, config, progress))
    speeds = _speeds(paths, config, progress) if config.speed else {}
    progress("done", len(paths), len(paths))
    return Report(
        # Names of files without their places, which would make the same report differ by machine.
        config=config.model_copy(
            update={
                "texts": tuple(Path(text).name for text in config.texts),
                "include_path": Path(config.include_path).name if config.include_path else None,
            }
        ),
        packages=package_versions(),
        speed_conditions=(
            speed_conditions(config.prompt_tokens, config.new_tokens, config.rounds)
            if config.speed
            else None
        ),
        directories=[
            record.model_copy(update={"speed": speeds.get(record.directory)}) for record in records
        ],
    )


def _refuse_repeated(what: str, names: list[str]) -> None:
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise ConfigError(
            f"report: expected different {what}, got {', '.join(repeated)} more than once."
        )


def _texts(path: Path, config: ReportConfig) -> list[TextWindows]:
    return [text_windows(path, text, config.seqlen, config.limit_chunks) for text in config.texts]


def _measure(
    path: Path,
    size: tuple[SizeRecord, dict[str, Any] | None],
    texts: list[TextWindows],
    tasks: Tasks | None,
    config: ReportConfig,
    progress: ProgressCallback,
) -> DirectoryRecord:
    """Everything of one directory but its speed."""
    model = load_model(path, run_dtype(config.dtype))
    perplexity = {}
    for text in texts:
        found = measure_perplexity(model, text, progress)
        perplexity[Path(text.text).name] = PerplexityRecord(
            perplexity=found.perplexity,
            nll=found.nll,
            tokens=found.tokens,
            chunks=found.chunks,
            bos_in_each_chunk=found.bos_in_each_chunk,
        )
    return DirectoryRecord(
        directory=str(path),
        kind="SmoothRot" if size[1] is not None else quantization_method(path) or "plain",
        architecture=type(model).__name__,
        dtype=str(model.dtype).removeprefix("torch."),
        size=size[0],
        conversion=size[1],
        perplexity=perplexity,
        tasks=tasks.score(model, path, config.limit) if tasks else [],
        speed=None,
    )


def _size(checkpoint: Checkpoint) -> tuple[SizeRecord, dict[str, Any] | None]:
    """Size of a directory, and the conversion's options if it is a converted one."""
    disk = sum((checkpoint.path / file).stat().st_size for file in checkpoint.files)
    quantization = checkpoint.config.get("quantization_config")
    if quantization is None:
        sixteen = 2 * sum(math.prod(info.shape) for info in checkpoint.tensors.values())
        return (
            SizeRecord(
                disk_bytes=disk, sixteen_bit_bytes=sixteen, ratio=sixteen / disk, linears_ratio=None
            ),
            None,
        )
    if quantization_method(checkpoint.path) != QUANT_METHOD:
        # Its tensors are packed in a way of its own.
        sixteen = sixteen_bit_bytes(checkpoint.path)
        return (
            SizeRecord(
                disk_bytes=disk, sixteen_bit_bytes=sixteen, ratio=sixteen / disk, linears_ratio=None
            ),
            None,
        )
    found = inspect(checkpoint.path)
    sixteen = found.sixteen_bit_bytes.total
    size = SizeRecord(
        disk_bytes=disk,
        sixteen_bit_bytes=sixteen,
        ratio=sixteen / disk,
        linears_ratio=found.ratio_linears,
    )
    return size, found.origin["config"]


def _speeds(
    paths: Sequence[Path], config: ReportConfig, progress: ProgressCallback
) -> dict[str, SpeedRecord]:
    models = {str(path): load_model(path, run_dtype(config.dtype)) for path in paths}
    return measure_speed(models, config.prompt_tokens, config.new_tokens, config.rounds, progress)
