# SPDX-License-Identifier: Apache-2.0
"""What every benchmark does with its results: a JSON file, a table, and a time to keep to."""

import json
import math
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from rich.box import MARKDOWN
from rich.console import Console
from rich.table import Table

RESULTS = Path(__file__).resolve().parents[1] / "results"
Row = Mapping[str, Any]


class Schedule:
    """Cases in order until the time is up; what was not begun is named."""

    def __init__(self, minutes: float | None) -> None:
        self.start = time.monotonic()
        self.seconds = math.inf if minutes is None else 60 * minutes
        self.left_out: list[str] = []

    def allows(self, case: str, share: float = 1.0) -> bool:
        """Whether less than ``share`` of the time has passed, so that a case may begin; one that
        is refused is remembered."""
        if time.monotonic() - self.start < share * self.seconds:
            return True
        self.left_out.append(case)
        return False


def save(report: Row, output: Path | None) -> None:
    """Write a report as JSON, replacing the file as a whole; nothing without a file."""
    if output is None:
        return
    output.parent.mkdir(parents=True, exist_ok=True)
    new = output.with_name(f"{output.name}.new")
    new.write_text(json.dumps(report, indent=1) + "\n")
    new.replace(output)


def terminal() -> Console:
    """Standard output, wide enough for every table where it is no terminal."""
    return Console(width=None if sys.stdout.isatty() else 300)


def show_table(
    console: Console,
    title: str,
    columns: Mapping[str, Callable[[Any], object]],
    rows: Iterable[Row],
) -> None:
    """Print rows as Markdown, nothing where there are none.

    Args:
        console: to print to.
        title: of the table.
        columns: heading, and what the column shows of a row; ``-`` where that raises KeyError or
            TypeError, because the row has no such value.
        rows: to show.
    """

    def shown(column: Callable[[Any], object], row: Row) -> str:
        try:
            return str(column(row))
        except (KeyError, TypeError):
            return "-"

    table = Table(*columns, box=MARKDOWN, title=title, title_justify="left")
    for row in rows:
        table.add_row(*(shown(column, row) for column in columns.values()))
    if table.rows:
        console.print(table)


def show_facts(report: Row, console: Console) -> None:
    """Print what a report has beside its rows: machine, floors, and whatever was not measured or
    failed, with the reasons."""
    console.print(report["machine"], report["packages"], report["floors"], sep="\n")
    reasons = {"not measured": report["missing"], "FAILED": report.get("failed", {})}
    for heading, named in reasons.items():
        for case, reason in named.items():
            console.print(f"{heading}: {case}: {reason}", markup=False, highlight=False)
    for case in report["left_out"]:
        console.print(f"left out, time was up: {case}", markup=False, highlight=False)
