# SPDX-License-Identifier: Apache-2.0
"""Conversions, plans, analyses and reports as tables for people."""

import json
import os
import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.filesize import decimal
from rich.table import Table

from smoothrot_offline.check.inspect import Inspection, Sizes
from smoothrot_offline.check.plan import Plan
from smoothrot_offline.config import ConvertConfig
from smoothrot_offline.convert import Conversion
from smoothrot_offline.presets import Choice
from smoothrot_offline.report.analysis import Analysis
from smoothrot_offline.report.compare import DirectoryRecord, Report
from smoothrot_offline.report.measure import DOWN, TRANSFORMS
from smoothrot_offline.report.pages import render
from smoothrot_vllm.errors import CheckpointError, ConfigError
from smoothrot_vllm.format import Online


def show_plan(plan: Plan, choice: Choice) -> RenderableType:
    """The recipe, sizes, Hadamard factorizations, tensor-parallel sizes, memory and time, and what
    to know of it.

    Only of a conversion that is not refused: then there is nothing to show but the reason.
    """
    if plan.refusals:
        return Group()
    parts: list[RenderableType] = [f"{plan.model}: {plan.architecture}, {plan.layers} layers"]
    parts.append(f"recipe: {choice.config.described()} ({choice.reason})")
    if plan.source_bytes is not None and plan.output_bytes is not None:
        parts.append(_size_table("source", plan.source_bytes, plan.output_bytes))
    if plan.hadamard:
        table = make_table("rotation", "width", "Hadamard blocks")
        for name, rotation in plan.hadamard.items():
            table.add_row(
                name,
                str(rotation.size),
                f"{rotation.size // rotation.block} of {rotation.block} = {rotation.factors}",
            )
        parts.append(table)
    if plan.tensor_parallel:
        table = make_table("tensor parallel", "served")
        for entry in plan.tensor_parallel:
            table.add_row(str(entry.size), entry.refused or "yes")
        parts.append(table)
    if plan.seconds is not None and plan.memory_bytes is not None:
        on_cpu = "" if plan.device == "cpu" else "; memory and time below are those of the CPU"
        parts.append(f"device: {plan.device}{on_cpu}")
        parts.append(
            f"memory: about {decimal(plan.memory_bytes)}; time: about {plan.seconds:.0f} s"
            " (estimates; --json says how)"
        )
    parts += [f"note: {note}" for note in (*choice.notes, *plan.notes)]
    return Group(*parts)


def show_inspection(found: Inspection) -> RenderableType:
    """What the checkpoint is, how it is stored, and how well each layer kept its weights."""
    weights, acts = found.quantization.weights, found.quantization.activations
    groups = "per channel" if weights.group_size == -1 else f"groups of {weights.group_size}"
    facts = make_table("", "", header=False)
    facts.add_row("architecture", f"{found.architecture}, {found.layers} layers, {found.dtype}")
    facts.add_row(
        "linears", f"W{weights.bits} ({groups}) A{acts.bits} (per token, clip {acts.clip})"
    )
    facts.add_row(
        "head",
        (
            "16 bits"
            if found.quantization.lm_head is None
            else f"{found.quantization.lm_head.weights.bits} bits"
        ),
    )
    facts.add_row("online Hadamard", _online_rotations(found.quantization.online))
    facts.add_row("tensor parallel", f"up to {found.quantization.max_tensor_parallel}")
    errors = make_table(
        "layer", "mean weight error", "worst", "smoothing scales", "largest activation"
    )
    for index, layer in enumerate(found.origin["layers"]):
        worst = max(layer["weight_error"], key=layer["weight_error"].get)
        scales, activation = _smoothing_cells(
            [record for record in [layer["smoothing"], *layer["experts"]] if record is not None]
        )
        errors.add_row(
            str(index),
            f"{sum(layer['weight_error'].values()) / len(layer['weight_error']):.4f}",
            f"{layer['weight_error'][worst]:.4f} {worst}",
            scales,
            activation,
        )
    return Group(facts, _size_table("16 bits", found.sixteen_bit_bytes, found.output_bytes), errors)


def _smoothing_cells(records: list[dict[str, Any]]) -> tuple[str, str]:
    """Range of the scales and largest activation of a layer's down_proj, or of those of its
    experts."""
    if not records:
        return "none", "not measured"
    least, most, activation = (
        combine(record[key] for record in records)
        for combine, key in ((min, "scale_min"), (max, "scale_max"), (max, "activation_max"))
    )
    return f"{least:.3g} to {most:.3g}", f"{activation:.4g}"


def show_conversion(done: Conversion, out: str) -> RenderableType:
    """Where the output is and what it took."""
    return (
        f"{out}: {len(done.manifest.tensors)} tensors, {decimal(done.output_bytes.total)}, in"
        f" {done.seconds:.0f} s"
    )


def _online_rotations(online: Online) -> str:
    inputs = {
        "down_proj input": online.down_proj,
        **{f"that within {module}": rotation for module, rotation in online.within.items()},
        "input of the residual stream's readers": online.readers,
    }
    return (
        "; ".join(
            f"{name}, {r.size} in blocks of {r.block}"
            for name, r in inputs.items()
            if r is not None
        )
        or "none"
    )


def _size_table(before_name: str, before: Sizes, after: Sizes) -> Table:
    table = make_table("", before_name, "SmoothRot", "ratio")
    for kind in Sizes.model_fields:
        table.add_row(kind, *_size_cells(getattr(before, kind), getattr(after, kind)))
    table.add_row("total", *_size_cells(before.total, after.total))
    return table


def _size_cells(before: int, after: int) -> tuple[str, str, str]:
    return decimal(before), decimal(after), f"{before / after:.2f}x" if before and after else ""


def make_table(*columns: str, header: bool = True) -> Table:
    """A table in the style of every command."""
    return Table(*columns, box=box.SIMPLE, show_header=header)


def show_analysis(found: Analysis, out: str) -> RenderableType:
    """Massive activations, mean errors, down_proj layer by layer, and the policies against max."""
    massive = make_table(
        "input of",
        "largest |x|",
        "layer",
        "token",
        "channel",
        "/ median",
        "massive tokens in layers",
    )
    for kind, record in found.massive.items():
        peak = record.peak
        massive.add_row(
            kind,
            f"{peak.magnitude:.4g}",
            str(record.layer),
            str(peak.position),
            str(peak.channel),
            _number(peak.ratio, ".0f"),
            ", ".join(map(str, record.massive_layers)) or "none",
        )
    errors = make_table("mean error", *TRANSFORMS)
    for kind, by_transform in found.mean_error.items():
        errors.add_row(kind, *(_number(by_transform.get(name), ".4g") for name in TRANSFORMS))
    difficulties, layers = (make_table(f"{DOWN} layer", *TRANSFORMS) for _ in range(2))
    for layer in found.layers:
        records = layer.inputs[DOWN].transforms
        difficulties.add_row(
            str(layer.index), *(f"{records[name].activation_difficulty:.4g}" for name in TRANSFORMS)
        )
        layers.add_row(str(layer.index), *(f"{records[name].error:.4g}" for name in TRANSFORMS))
    policies = make_table(
        "policy",
        "error / max",
        "as converted",
        "selects",
        "error / max there",
        "as converted there",
    )
    for policy, summary in found.policies.items():
        policies.add_row(
            policy,
            _number(summary.ratio_of_means, ".4f"),
            _number(summary.converted_ratio_of_means, ".4f"),
            f"{len(summary.selected_layers)} layers",
            _number(summary.selected_ratio, ".4f"),
            _number(summary.converted_selected_ratio, ".4f"),
        )
    return Group(
        massive,
        errors,
        "activation difficulty",
        difficulties,
        "layer error",
        layers,
        "smoothing policies at down_proj with R4, mean error against max",
        policies,
        f"{out}: pictures in report.html",
    )


def _number(value: float | None, spec: str) -> str:
    return "" if value is None else format(value, spec)


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
        " quantized linears multiply integers."
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
            "page.html.jinja",
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
