# SPDX-License-Identifier: Apache-2.0
"""Progress of a long command: a callback for the pipeline, and a bar on stderr for people."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

ProgressCallback = Callable[[str, int, int], None]
"""``(what is being done, steps done, steps in all)``."""


def no_progress(_message: str, _done: int, _total: int) -> None:
    """Report nothing."""


@contextmanager
def progress_bar() -> Iterator[ProgressCallback]:
    """A bar on stderr while the context is open; plain silence if stderr is no terminal."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=False) as bar:
        task = bar.add_task("starting", total=None)

        def report(message: str, done: int, total: int) -> None:
            bar.update(task, description=message, completed=done, total=total)

        yield report
