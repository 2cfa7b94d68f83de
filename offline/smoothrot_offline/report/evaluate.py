# SPDX-License-Identifier: Apache-2.0
"""Perplexity on a text, and zero-shot tasks through lm-eval itself."""

import math
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict
from transformers import PreTrainedModel

from smoothrot_offline.config import MOST
from smoothrot_offline.console import ProgressCallback, no_progress, progress_bar
from smoothrot_offline.device import CPU, computing_on
from smoothrot_offline.report.model import load_model
from smoothrot_offline.source.text import family_needs_bos, read_text, tokenize
from smoothrot_offline.source.tokenizers import load_tokenizer
from smoothrot_vllm.errors import ConfigError

_LOGIT_ROWS = 512


@dataclass(frozen=True)
class PerplexityResult:
    """What :func:`evaluate_perplexity` measured; ``tokens`` counts predicted tokens, ``nll`` is
    their mean in nats."""

    perplexity: float
    nll: float
    tokens: int
    chunks: int
    seqlen: int
    bos_in_each_chunk: bool
    dtype: str
    text: str
    seconds: float


@dataclass(frozen=True)
class TextWindows:
    """A text as a model reads it: int64 windows, and whether each begins with a ``<bos>`` of its
    own."""

    text: str
    seqlen: int
    chunks: list[torch.Tensor]
    bos_in_each: bool


def evaluate_perplexity(
    directory: str | Path,
    text_file: str | Path,
    seqlen: int = 2048,
    limit_chunks: int | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device = CPU,
) -> PerplexityResult:
    """Perplexity ``exp(mean NLL)`` of a text, tokenised once and cut into windows that do not
    overlap.

    Args:
        directory: model directory, plain or SmoothRot.
        text_file, seqlen, limit_chunks: see :func:`text_windows`.
        dtype: run in this dtype instead of the model's own; NLL is summed in float64 from float32
            log-probabilities.
        device: where the model runs, as a whole.

    Raises:
        ConfigError: an option out of range, or a text of fewer than two tokens.
        CheckpointError: the directory does not load.
        DeviceMemoryError: a GPU has too little memory.
    """
    text = text_windows(directory, text_file, seqlen, limit_chunks)
    with computing_on(device), progress_bar() as progress:
        return measure_perplexity(load_model(directory, dtype, device=device), text, progress)


def text_windows(
    directory: str | Path,
    text_file: str | Path,
    seqlen: int = 2048,
    limit_chunks: int | None = None,
) -> TextWindows:
    """Cut a text into windows of ``seqlen`` tokens of the directory's tokenizer; only the first
    ``limit_chunks`` of them.

    The tail is kept: n tokens make ``ceil(n / seqlen)`` windows and each predicts its length - 1
    tokens. The text is what the tokenizer makes of it, its special tokens included; only families
    that fall apart without ``<bos>`` (Gemma) get it in each window, as the first of its ``seqlen``
    tokens.

    Args:
        directory: model directory, plain or SmoothRot.
        text_file: a text as :func:`~smoothrot_offline.source.text.read_text` takes it.
        seqlen: window length in tokens, at least 2.
        limit_chunks: only the first so many windows.

    Raises:
        ConfigError: an option out of range, or a text of fewer than two tokens.
        CheckpointError: the directory has no tokenizer.
    """
    if not 2 <= seqlen <= MOST or (limit_chunks is not None and not 1 <= limit_chunks <= MOST):
        raise ConfigError(
            f"eval: expected --seqlen >= 2 and --limit-chunks >= 1, both up to {MOST}, got {seqlen}"
            f" and {limit_chunks}."
        )
    tokenizer = load_tokenizer(directory)
    text = read_text(text_file, tokenizer)
    bos = tokenizer.bos_token_id if family_needs_bos(directory) else None
    chunks = windows(tokenize(tokenizer, text, special_tokens=bos is None), seqlen, bos)[
        :limit_chunks
    ]
    if not chunks:
        raise ConfigError(
            f"{text_file}: expected at least 2 tokens, one to predict from another. Use a longer"
            " text."
        )
    return TextWindows(str(text_file), seqlen, chunks, bos is not None)


def measure_perplexity(
    model: PreTrainedModel, text: TextWindows, progress: ProgressCallback = no_progress
) -> PerplexityResult:
    """Perplexity of a loaded model on a text; ``seconds`` are those of its forward passes."""

    def reported() -> Iterator[torch.Tensor]:
        for number, chunk in enumerate(text.chunks):
            progress(f"perplexity on {Path(text.text).name}", number, len(text.chunks))
            yield chunk
        progress(f"perplexity on {Path(text.text).name}", len(text.chunks), len(text.chunks))

    started = time.perf_counter()
    nll, tokens = total_nll(model, reported())
    return PerplexityResult(
        perplexity=math.exp(nll / tokens),
        nll=nll / tokens,
        tokens=tokens,
        chunks=len(text.chunks),
        seqlen=text.seqlen,
        bos_in_each_chunk=text.bos_in_each,
        dtype=str(model.dtype).removeprefix("torch."),
        text=text.text,
        seconds=round(time.perf_counter() - started, 1),
    )


def run_dtype(name: str) -> torch.dtype | None:
    """The torch dtype of a ``--dtype`` option; None, the model's own, for ``auto``."""
    return None if name == "auto" else getattr(torch, name)


def windows(tokens: torch.Tensor, seqlen: int, bos: int | None = None) -> list[torch.Tensor]:
    """Consecutive int64 windows ``(<= seqlen,)`` that can predict a token, tail included, each
    after ``bos`` if given."""
    if bos is None:
        return [w for w in tokens.split(seqlen) if len(w) > 1]
    return [torch.cat((torch.tensor([bos]), w)) for w in tokens.split(seqlen - 1) if len(w)]


@torch.inference_mode()
def total_nll(model: PreTrainedModel, chunks: Iterable[torch.Tensor]) -> tuple[float, int]:
    """Summed negative log-likelihood in nats and the number of predicted tokens."""
    nll, tokens = 0.0, 0
    for chunk in (chunk.to(model.device) for chunk in chunks):
        logits = model(chunk[None], use_cache=False).logits[0, :-1]
        for rows, targets in zip(
            logits.split(_LOGIT_ROWS), chunk[1:].split(_LOGIT_ROWS), strict=True
        ):
            losses = torch.nn.functional.cross_entropy(rows.float(), targets, reduction="none")
            nll += losses.double().sum().item()
        tokens += len(chunk) - 1
    return nll, tokens


BATCH = 8
"""Requests that lm-eval runs at once; activations are quantized token by token, so it changes no
score but by rounding."""


class TaskScore(BaseModel):
    """One metric of one lm-eval task, with its standard error where lm-eval gives one."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    task: str
    metric: str
    value: float
    standard_error: float | None
    samples: int


class Tasks:
    """lm-eval tasks by name, found before any model is loaded.

    Args:
        names: as lm-eval spells them.
        include_path: folder of further task files; if it has all of the tasks, lm-eval's own are
            not even indexed.

    Raises:
        ConfigError: lm-eval is not installed, a task is unknown, or its data cannot be read.
    """

    def __init__(self, names: Sequence[str], include_path: str | None) -> None:
        try:
            from lm_eval.tasks import TaskManager
        except ImportError as error:
            raise ConfigError(
                f"--tasks {','.join(names)}: needs the lm-eval package, which is not installed or"
                f" incomplete ({error}): pip install 'smoothrot-vllm[eval]'."
            ) from error
        if include_path is not None and not Path(include_path).is_dir():
            raise ConfigError(
                f"--include-path {include_path}: expected a folder of lm-eval task files; there is"
                " none."
            )
        self._names = list(names)
        self._manager: Any = None
        if include_path is not None:
            self._manager = TaskManager(include_path=include_path, include_defaults=False)
        if self._manager is None or self._unknown():
            self._manager = TaskManager(include_path=include_path)
        if self._unknown():
            raise ConfigError(
                f"--tasks: lm-eval knows no {', '.join(self._unknown())}. Check the spelling"
                " (lm-eval ls tasks), or give the folder of its task file with --include-path."
            )
        try:
            self._manager.load(self._names)
        except (
            Exception
        ) as error:  # the task's data set library raises whatever its network and file layers do
            raise ConfigError(
                f"--tasks {','.join(names)}: lm-eval cannot load their data:"
                f" {type(error).__name__}: {error}. Without a network, give task files that read"
                " local data, with --include-path."
            ) from error

    def score(self, model: PreTrainedModel, directory: Path, limit: int | None) -> list[TaskScore]:
        """Every metric of every task; ``limit`` takes the first documents of each only."""
        import lm_eval
        from lm_eval.models.huggingface import HFLM

        wrapped = HFLM(
            pretrained=model,
            tokenizer=load_tokenizer(directory),
            batch_size=BATCH,
            add_bos_token=True if family_needs_bos(directory) else None,
        )
        found = lm_eval.simple_evaluate(
            model=wrapped,
            tasks=self._names,
            task_manager=self._manager,
            limit=limit,
            log_samples=False,
        )
        return [
            score
            for task, metrics in found["results"].items()
            if task in found["n-samples"]  # groups have their tasks' scores again
            for score in _scores(task, metrics, found["n-samples"][task]["effective"])
        ]

    def _unknown(self) -> list[str]:
        return [name for name in self._names if name not in self._manager.all_tasks]


def _scores(task: str, metrics: dict[str, Any], samples: int) -> list[TaskScore]:
    scores = []
    for key, value in metrics.items():
        metric, comma, filtered = key.partition(",")
        if not comma or metric.endswith("_stderr"):
            continue
        error = metrics.get(f"{metric}_stderr,{filtered}")
        scores.append(
            TaskScore(
                task=task,
                metric=metric if filtered == "none" else key,
                value=float(value),
                standard_error=float(error) if isinstance(error, float) else None,
                samples=samples,
            )
        )
    return scores
