# SPDX-License-Identifier: Apache-2.0
"""Zero-shot tasks through lm-eval itself, on a model that is already loaded."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from smoothrot_offline.calibration_data import family_needs_bos
from smoothrot_offline.foreign_tokenizers import load_tokenizer
from smoothrot_offline.reporting.record import TaskScore
from smoothrot_vllm.errors import ConfigError

BATCH = 8
"""Requests that lm-eval runs at once; activations are quantised token by token, so it changes no
score but by rounding."""


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
