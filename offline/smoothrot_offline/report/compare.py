# SPDX-License-Identifier: Apache-2.0
"""``smoothrot-convert report``: sizes, accuracy and tokens a second of several directories, side by
side: each round runs every model, so that a drift hits them alike."""

import math
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict
from transformers import PreTrainedModel

from smoothrot_offline.check.inspect import inspect
from smoothrot_offline.config import ReportConfig
from smoothrot_offline.console import ProgressCallback, no_progress
from smoothrot_offline.output.manifest import package_versions
from smoothrot_offline.report.evaluate import (
    Tasks,
    TaskScore,
    TextWindows,
    measure_perplexity,
    run_dtype,
    text_windows,
)
from smoothrot_offline.report.model import load_model
from smoothrot_offline.source.headers import read_headers
from smoothrot_offline.source.models import load_config, quantization_method, sixteen_bit_bytes
from smoothrot_vllm import ops
from smoothrot_vllm.errors import ConfigError
from smoothrot_vllm.format import QUANT_METHOD


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class SizeRecord(_Record):
    """Bytes of the weight files on disk, bytes of the same model with 16 bits a weight, and their
    ratio.

    ``linears_ratio`` is that of the decoder's linear layers alone, for a converted directory.
    """

    disk_bytes: int
    sixteen_bit_bytes: int
    ratio: float
    linears_ratio: float | None


class PerplexityRecord(_Record):
    """Perplexity on one text in windows that do not overlap, tail included; ``nll`` in nats for
    each predicted token."""

    perplexity: float
    nll: float
    tokens: int
    chunks: int
    bos_in_each_chunk: bool


class SpeedRecord(_Record):
    """Medians of the rounds, tokens a second, and their ratios to the first directory's; every
    round's in ``rounds_*``."""

    prefill: float
    decode: float
    prefill_ratio: float
    decode_ratio: float
    rounds_prefill: list[float]
    rounds_decode: list[float]


class SpeedConditions(_Record):
    """What the speeds are of."""

    method: str
    threads: int
    kernel: str


class DirectoryRecord(_Record):
    """One directory; ``kind`` is plain, SmoothRot or the name of another quantization method,
    ``conversion`` the options in the manifest of a SmoothRot one."""

    directory: str
    kind: str
    architecture: str
    dtype: str
    size: SizeRecord
    conversion: dict[str, Any] | None
    perplexity: dict[str, PerplexityRecord]
    tasks: list[TaskScore]
    speed: SpeedRecord | None


class Report(_Record):
    """The whole report; directories in the order they were given."""

    report_version: Literal[1] = 1
    config: ReportConfig
    packages: dict[str, str]
    speed_conditions: SpeedConditions | None
    directories: list[DirectoryRecord]


METHOD = (
    "batch 1, through the forward pass of transformers with its key-value cache, in this process:"
    " prefill is one pass over {prompt} tokens, decode is {new} greedy steps of one token after it."
    " Quantized linears run on this project's compiled kernels, everything else on torch's. This is"
    " no serving speed: vLLM batches, and has other attention kernels. Medians of {rounds} rounds"
    " after one to warm up; each round runs every directory in turn"
)


def check_context(directory: Path, prompt_tokens: int, new_tokens: int) -> None:
    """Refuse to measure beyond the model's context, which its config.json gives.

    Raises:
        ConfigError: ``prompt_tokens + new_tokens`` exceeds ``max_position_embeddings``.
    """
    context = load_config(directory).get_text_config().max_position_embeddings
    if prompt_tokens + new_tokens > context:
        raise ConfigError(
            f"{directory}: --prompt-tokens {prompt_tokens} and --new-tokens {new_tokens}: expected"
            f" at most the model's context of {context} together. Choose fewer, or --no-speed."
        )


def measure_speed(
    models: Mapping[str, PreTrainedModel],
    prompt_tokens: int,
    new_tokens: int,
    rounds: int,
    progress: ProgressCallback,
) -> dict[str, SpeedRecord]:
    """Prefill and decode speed of each model; ratios are to the first. Tokens are arbitrary:
    their values cost no time."""
    prefill: dict[str, list[float]] = {name: [] for name in models}
    decode: dict[str, list[float]] = {name: [] for name in models}
    for number in range(rounds + 1):
        progress(f"speed, round {number} of {rounds}", number, rounds + 1)
        for name, model in models.items():
            seconds = _one_round(model, prompt_tokens, new_tokens)
            if number:
                prefill[name].append(prompt_tokens / seconds[0])
                decode[name].append(new_tokens / seconds[1])
    first = next(iter(models))
    return {
        name: SpeedRecord(
            prefill=statistics.median(prefill[name]),
            decode=statistics.median(decode[name]),
            prefill_ratio=_ratio(prefill[name], prefill[first]),
            decode_ratio=_ratio(decode[name], decode[first]),
            rounds_prefill=prefill[name],
            rounds_decode=decode[name],
        )
        for name in models
    }


def speed_conditions(prompt_tokens: int, new_tokens: int, rounds: int) -> SpeedConditions:
    """What :func:`measure_speed` measures, in words, and what it runs on."""
    method = METHOD.format(prompt=prompt_tokens, new=new_tokens, rounds=rounds)
    return SpeedConditions(method=method, threads=torch.get_num_threads(), kernel=ops.kernel_name())


@torch.inference_mode()
def _one_round(model: PreTrainedModel, prompt_tokens: int, new_tokens: int) -> tuple[float, float]:
    """Seconds of prefill and of all decode steps."""
    prompt = torch.arange(prompt_tokens)[None] % model.config.get_text_config().vocab_size
    started = time.perf_counter()
    output = model(prompt, use_cache=True, logits_to_keep=1)
    prefilled = time.perf_counter()
    for _ in range(new_tokens):
        output = model(
            output.logits[:, -1:].argmax(dim=-1),
            past_key_values=output.past_key_values,
            use_cache=True,
        )
    return prefilled - started, time.perf_counter() - prefilled


def _ratio(own: Sequence[float], reference: Sequence[float]) -> float:
    return statistics.median(own) / statistics.median(reference)


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
        ConfigError: a directory is quantized by a method whose package is not installed.
    """
    paths = list(directories)
    _refuse_repeated("directories", [str(path.resolve()) for path in paths])
    _refuse_repeated("--text: files of different names", [Path(text).name for text in config.texts])
    sizes = {path: _size(path) for path in paths}
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


def _size(path: Path) -> tuple[SizeRecord, dict[str, Any] | None]:
    """Size of a directory, and the conversion's options if it is a converted one."""
    found = read_headers(path)
    files = {info.file for info in found.tensors.values()}
    disk = sum((path / file).stat().st_size for file in files)
    method = quantization_method(path)
    if method is None:
        sixteen = 2 * sum(math.prod(info.shape) for info in found.tensors.values())
        return (
            SizeRecord(
                disk_bytes=disk, sixteen_bit_bytes=sixteen, ratio=sixteen / disk, linears_ratio=None
            ),
            None,
        )
    if method != QUANT_METHOD:
        # Its tensors are packed in a way of its own.
        sixteen = sixteen_bit_bytes(path)
        return (
            SizeRecord(
                disk_bytes=disk, sixteen_bit_bytes=sixteen, ratio=sixteen / disk, linears_ratio=None
            ),
            None,
        )
    inspected = inspect(path)
    sixteen = inspected.sixteen_bit_bytes.total
    size = SizeRecord(
        disk_bytes=disk,
        sixteen_bit_bytes=sixteen,
        ratio=sixteen / disk,
        linears_ratio=inspected.ratio_linears,
    )
    return size, inspected.origin["config"]


def _speeds(
    paths: Sequence[Path], config: ReportConfig, progress: ProgressCallback
) -> dict[str, SpeedRecord]:
    models = {str(path): load_model(path, run_dtype(config.dtype)) for path in paths}
    return measure_speed(models, config.prompt_tokens, config.new_tokens, config.rounds, progress)
