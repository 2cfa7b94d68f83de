# SPDX-License-Identifier: Apache-2.0
"""What a command prints: results on stdout, progress and refusals on stderr; with ``--json`` one
object."""

import ctypes
import inspect
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import typer
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from rich.console import Console, RenderableType
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from smoothrot_vllm.errors import ConfigError, SmoothRotError

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_KEEP_BELOW = 1 << 30

Command = TypeVar("Command", bound=Callable[..., None])

Json = Annotated[
    bool, typer.Option("--json", help="Print one JSON object on stdout and nothing else.")
]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
Device = Annotated[
    str,
    typer.Option(
        metavar="auto|cpu|cuda|cuda:N",
        help="Where to compute; auto: the GPU if torch can use one, else the CPU.",
    ),
]
RunDtype = Annotated[
    Literal["float32", "bfloat16", "float16", "auto"],
    typer.Option(
        help=(
            "Arithmetic of everything but the quantized linears' integers; auto: the dtype of"
            " config.json."
        )
    ),
]


def options_of(kind: type[BaseModel], **special: dict[str, Any]) -> Callable[[Command], Command]:
    """Give a command, which takes ``**options``, an option for each field of ``kind`` that has a
    description: its name, default, limits and help.

    Args:
        special: further settings of typer's by field, and its ``annotation`` if it is another.
    """
    added = [
        inspect.Parameter(
            name,
            inspect.Parameter.KEYWORD_ONLY,
            default=special.get(name, {}).get("default", field.default),
            annotation=_annotation(field, dict(special.get(name, {}))),
        )
        for name, field in kind.model_fields.items()
        if field.description
    ]

    def decorate(command: Command) -> Command:
        signature = inspect.signature(command)
        own = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
        command.__signature__ = signature.replace(parameters=[*own, *added])  # type: ignore[attr-defined]
        return command

    return decorate


def _annotation(field: FieldInfo, settings: dict[str, Any]) -> Any:
    kind = settings.pop("annotation", field.annotation)
    shown = settings.pop("default", field.default) is not None
    limits = {type(limit).__name__: limit for limit in field.metadata}
    least, most = limits.get("Ge"), limits.get("Le")
    settings["min"] = getattr(least, "ge", None)
    settings["max"] = getattr(most, "le", None) if kind is float else None
    return Annotated[kind, typer.Option(help=field.description, show_default=shown, **settings)]


@contextmanager
def reporting(
    as_json: bool, debug: bool, over_ranks: bool = False
) -> Iterator[Callable[[dict[str, Any], RenderableType], None]]:
    """Keep what libraries print off stdout, and turn errors into one line and exit code 1.

    Yields the function that prints a result: its facts as JSON, or its display. ``over_ranks``
    says that the command may be one of several processes of ``torchrun``, of which the first one
    prints.
    """
    stdout = sys.stdout
    rank, count = (int(os.environ.get(name, "0")) for name in ("RANK", "WORLD_SIZE"))

    def show(facts: dict[str, Any], display: RenderableType) -> None:
        if rank:
            return
        if as_json:
            print(json.dumps(facts, ensure_ascii=False), file=stdout)
        else:
            # In a pipe or a file, lines are as long as what they say: nothing is wrapped, no path
            # is split.
            width = None if stdout.isatty() else 10_000
            Console(file=stdout, markup=False, highlight=False, width=width).print(display)

    try:
        with redirect_stdout(sys.stderr), _ranks(count, over_ranks):
            yield show
    except typer.Exit:
        raise
    except SmoothRotError as error:
        if debug:
            raise
        refuse([str(error)])
    except Exception as error:
        if debug:
            raise
        # What torch raises has no type of its own.
        if isinstance(error, MemoryError) or "can't allocate memory" in str(error):
            found = str(error) or type(error).__name__
            refuse(
                [
                    f"expected more memory than the system gives: {found}. Choose less of it, or"
                    " use a machine with more."
                ]
            )
        if isinstance(error, OSError):
            refuse([f"the system refuses: {error}. Check the path, its permissions and the disk."])
        refuse(
            [
                f"unexpected {type(error).__name__}: {error}. This is a bug: report it with what"
                " --debug shows."
            ]
        )


@contextmanager
def _ranks(count: int, expected: bool) -> Iterator[None]:
    if count < 2:
        yield
        return
    if not expected:
        raise ConfigError(
            f"WORLD_SIZE is {count}: expected one process, as only run shares its work over those"
            " of torchrun. Run the command by itself."
        )
    # Imports torch, which takes seconds.
    from smoothrot_offline.ranks import together

    with together():
        yield


def refuse(problems: list[str]) -> None:
    """Print each problem in one line on stderr and, if there are any, exit with code 1."""
    for problem in problems:
        print("error: " + " ".join(problem.split()), file=sys.stderr)
    if problems:
        raise typer.Exit(1)


def refuse_unsupported(model: str) -> None:
    """Refuse at once, before torch is imported, what ``config.json`` and the state of the files do
    not allow.

    Raises:
        SmoothRotError: a file is missing or damaged, or the family is not one that converts.
    """
    from smoothrot_offline.source.headers import is_local, read_config, read_headers
    from smoothrot_offline.source.resolve import supported_table

    supported_table(
        read_headers(model).config if is_local(model) else read_config(model), packed=True
    )


def exit_on_sigterm() -> None:
    """A polite kill unwinds like Ctrl-C, so that a partial output is removed, or left so that it
    can be gone on with."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))


@contextmanager
def explain_resuming(out: Path) -> Iterator[None]:
    """On Ctrl-C or a polite kill of a conversion into ``out``, say what was kept and end with
    the exit code of the signal."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit) as error:
        from smoothrot_offline.output.directory import unfinished_output

        if (kept := unfinished_output(out)) is not None:
            print(
                f"interrupted: run the same command again to go on; what is finished is in {kept}",
                file=sys.stderr,
            )
        else:
            print("interrupted before anything was finished: nothing was kept", file=sys.stderr)
        code = error.code if isinstance(error, SystemExit) else 128 + signal.SIGINT
        raise typer.Exit(int(code or 0)) from None


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


def reuse_freed_memory() -> None:
    """Let glibc keep freed blocks of up to a gibibyte for the next tensor instead of giving each
    back to the system.

    A layer's activations are allocated and freed over and over; by default each time maps fresh
    pages, which must be zeroed and faulted in one by one. Does nothing where the C library is
    another.
    """
    if not sys.platform.startswith("linux"):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, _KEEP_BELOW)
        mallopt(_M_TRIM_THRESHOLD, 2 * _KEEP_BELOW - 1)
