# SPDX-License-Identifier: Apache-2.0
"""Progress of a long command: a callback for the pipeline; on stderr a bar for people, lines for
a log."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

ProgressCallback = Callable[[str, int, int], None]
"""``(what is being done, steps done, steps in all)``."""

_LINES_APART = 30.0
"""Seconds between two lines of a log that say the same but for the count."""


def no_progress(_message: str, _done: int, _total: int) -> None:
    """Report nothing."""


@contextmanager
def progress_bar() -> Iterator[ProgressCallback]:
    """A bar on stderr while the context is open, which goes when it closes; lines if stderr is
    no terminal."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield _lines()
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("starting", total=None)

        def report(message: str, done: int, total: int) -> None:
            bar.update(task, description=message, completed=done, total=total)

        yield report


def _lines() -> ProgressCallback:
    """A line for each stage that begins, with the steps in all, and the time left if they take
    as long as those before."""
    started = time.monotonic()
    said, at = "", started

    def report(message: str, done: int, total: int) -> None:
        nonlocal said, at
        now = time.monotonic()
        if message == said and now - at < _LINES_APART:
            return
        said, at = message, now
        elapsed = now - started
        left = (
            f", about {_duration(elapsed / done * (total - done))} left" if 0 < done < total else ""
        )
        print(
            f"{done} of {total} steps, {_duration(elapsed)}{left}: {message}",
            file=sys.stderr,
            flush=True,
        )

    return report


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return (
        f"{hours} h {minutes} min"
        if hours
        else f"{minutes} min {rest} s"
        if minutes
        else f"{rest} s"
    )
