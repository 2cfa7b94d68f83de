# SPDX-License-Identifier: Apache-2.0
"""A report as tables for people, and as a file."""

import json
import os
import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from rich.console import Group, RenderableType
from rich.filesize import decimal

from smoothrot_offline.config import ConvertConfig
from smoothrot_offline.display import make_table
from smoothrot_offline.page import render
from smoothrot_offline.reporting.record import DirectoryRecord, Report
from smoothrot_vllm.errors import CheckpointError, ConfigError

Cell = Callable[[DirectoryRecord], str]

_SUFFIXES = (".html", ".json")


@dataclass(frozen=True)
class ReportTable:
    """One table: its title, and a row of cells for each directory below the header."""

    title: str
    header: list[str]
    rows: list[list[str]]


def report_tables(report: Report) -> list[ReportTable]:
    """The report's tables, the same on a terminal and on the page."""
    config = report.config
    size = {"weights": _disk, "against 16 bits": _ratio, "linear layers": _linears}
    tables = [
        _table(report, "conversion", {"recipe": _recipe}),
        _table(report, "size on disk", size),
    ]
    for text in config.texts:
        first = "" if config.limit_chunks is None else f", the first {config.limit_chunks} only"
        columns = {"perplexity": _perplexity(text), "tokens": _tokens(text)}
        tables.append(
            _table(report, f"perplexity on {text}, windows of {config.seqlen}{first}", columns)
        )
    if config.tasks:
        first = "" if config.limit is None else f", the first {config.limit} documents of each only"
        columns = {
            f"{score.task} {score.metric}": _score(i)
            for i, score in enumerate(report.directories[0].tasks)
        }
        tables.append(_table(report, f"lm-eval tasks{first} (± standard error)", columns))
    if report.speed_conditions is not None:
        columns = {"prefill": _speed("prefill"), "decode": _speed("decode")}
        tables.append(_table(report, "speed, tokens/s (against the first directory)", columns))
    return tables


def report_notes(report: Report) -> list[str]:
    """What the numbers are of, in words."""
    dtypes = ", ".join(sorted({record.dtype for record in report.directories}))
    notes = [
        f"Arithmetic: {dtypes} in every directory, whatever dtype its weights are stored in;"
        " quantised linears multiply integers."
    ]
    conditions = report.speed_conditions
    if conditions is not None:
        notes.append(
            f"Speed: {conditions.method}; {conditions.threads} threads, kernels:"
            f" {conditions.kernel}."
        )
    return notes


def show_report(report: Report) -> RenderableType:
    """Every table, then the conditions."""
    parts: list[RenderableType] = []
    for content in report_tables(report):
        table = make_table(*content.header)
        for row in content.rows:
            table.add_row(*row)
        parts += [content.title, table]
    return Group(*parts, *report_notes(report))


def check_report_file(path: Path) -> None:
    """Refuse a report file of an unknown kind or one that is there already.

    Raises:
        ConfigError: either.
    """
    if path.suffix not in _SUFFIXES:
        raise ConfigError(
            f"--out {path}: expected a name that ends in {' or '.join(_SUFFIXES)}, got {path.name}."
        )
    if path.exists():
        raise ConfigError(
            f"--out {path}: expected no such file. Choose another, or remove it first."
        )


def write_report(report: Report, path: Path) -> None:
    """Write the report as a page or as JSON, by the name's ending; the file appears whole or not at
    all.

    Raises:
        ConfigError: such a file has appeared meanwhile.
        CheckpointError: the file system refuses.
    """
    if path.suffix == ".json":
        content = json.dumps(report.model_dump(mode="json"), indent=2, ensure_ascii=False) + "\n"
    else:
        content = render(
            "report.html.jinja",
            report=report,
            tables=report_tables(report),
            notes=report_notes(report),
        )
    partial = path.with_name(f"{path.name}.partial-{secrets.token_hex(4)}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("x", encoding="utf-8") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        check_report_file(path)
        partial.rename(path)
    except OSError as error:
        raise CheckpointError(
            f"{path}: the report could not be written: {error}. Check the disk and its permissions."
        ) from error
    finally:
        partial.unlink(missing_ok=True)


def _table(report: Report, title: str, columns: Mapping[str, Cell]) -> ReportTable:
    rows = [
        [record.directory, *(cell(record) for cell in columns.values())]
        for record in report.directories
    ]
    return ReportTable(title, ["directory", *columns], rows)


def _disk(record: DirectoryRecord) -> str:
    return decimal(record.size.disk_bytes)


def _ratio(record: DirectoryRecord) -> str:
    return f"{record.size.ratio:.2f}x smaller" if record.kind != "plain" else ""


def _linears(record: DirectoryRecord) -> str:
    return "" if record.size.linears_ratio is None else f"{record.size.linears_ratio:.2f}x smaller"


def _recipe(record: DirectoryRecord) -> str:
    """The conversion in a line; the record holds every option."""
    options = record.conversion
    if options is None:
        return "none" if record.kind == "plain" else f"not ours: {record.kind}"
    return f"{ConvertConfig.model_validate(options).described()}, seed {options['seed']}"


def _perplexity(text: str) -> Cell:
    return lambda record: f"{record.perplexity[text].perplexity:.4f}"


def _tokens(text: str) -> Cell:
    return lambda record: str(record.perplexity[text].tokens)


def _score(number: int) -> Cell:
    def cell(record: DirectoryRecord) -> str:
        score = record.tasks[number]
        return (
            f"{score.value:.4f}"
            if score.standard_error is None
            else f"{score.value:.4f} ± {score.standard_error:.4f}"
        )

    return cell


def _speed(phase: str) -> Cell:
    return lambda record: (
        f"{getattr(record.speed, phase):.1f} ({getattr(record.speed, f'{phase}_ratio'):.2f}x)"
    )
