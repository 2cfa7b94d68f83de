# SPDX-License-Identifier: Apache-2.0
"""The commands ``analyze`` and ``report`` of ``smoothrot-convert``."""

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from smoothrot_offline.console import (
    Debug,
    Device,
    Json,
    RunDtype,
    refuse_unsupported,
    reporting,
    unwind_when_killed,
)
from smoothrot_vllm.errors import ConfigError

Model = Annotated[
    str, typer.Argument(help="Directory of the 16-bit model, or its hub id.", show_default=False)
]
Out = Annotated[
    Path,
    typer.Argument(help="Directory to make; it appears when it is complete.", show_default=False),
]
Calib = Annotated[
    str,
    typer.Option(
        help="Calibration text: a file, 'generated' by the model itself, or a hub data set."
    ),
]
Samples = Annotated[
    int, typer.Option(min=1, help="Sequences that scales are chosen from; as many others measure.")
]
Seqlen = Annotated[int, typer.Option(min=2, help="Tokens of a sequence.")]
Seed = Annotated[
    int, typer.Option(min=0, help="Seed of the random signs and of the calibration text.")
]
Policies = Annotated[
    str | None,
    typer.Option(
        help="Smoothing policies to compare with max, by commas; all of them if absent.",
        show_default=False,
    ),
]
Directories = Annotated[
    list[Path],
    typer.Argument(help="Directories; speeds are compared with the first.", show_default=False),
]
Texts = Annotated[
    list[Path] | None,
    typer.Option(
        help="Text for perplexity: UTF-8, or .jsonl of texts or chats. Repeatable.",
        show_default=False,
    ),
]
Layers = Annotated[
    str | None, typer.Option(help="Only these layers: 0,5,10-12.", show_default=False)
]


def analyze(
    model: Model,
    out: Out,
    calib: Calib = "generated",
    calib_samples: Samples = 8,
    calib_seqlen: Seqlen = 512,
    seed: Seed = 0,
    policies: Policies = None,
    layers: Layers = None,
    device: Device = "auto",
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Measure how hard each layer of MODEL is to quantise, before and after each transform, into
    the new directory OUT."""
    unwind_when_killed()
    with reporting(as_json, debug) as show:
        refuse_unsupported(model)
        from smoothrot_offline.config import make_options
        from smoothrot_offline.console import progress_bar
        from smoothrot_offline.device import choose_device
        from smoothrot_offline.report.analysis import AnalysisConfig
        from smoothrot_offline.report.analyze import analyze as analyze_model
        from smoothrot_offline.report.tables import show_analysis
        from smoothrot_offline.source.headers import resolve_source

        options: dict[str, Any] = {
            "calib": calib,
            "calib_samples": calib_samples,
            "calib_seqlen": calib_seqlen,
            "seed": seed,
        }
        if policies is not None:
            options["policies"] = _names(policies)
        if layers is not None:
            options["layers"] = _layer_numbers(layers)
        config = make_options(AnalysisConfig, "analyze", options)
        chosen = choose_device(device)
        print(f"device: {chosen.described}", file=sys.stderr)
        with progress_bar() as progress:
            found, removed = analyze_model(
                resolve_source(model), out, config, progress, chosen.device
            )
        for leftover in removed:
            print(f"removed {leftover}, left by an analysis that was killed", file=sys.stderr)
        show(found.model_dump(mode="json"), show_analysis(found, str(out)))


def report(
    directories: Directories,
    text: Texts = None,
    seqlen: Annotated[int, typer.Option(min=2, help="Tokens of a window.")] = 2048,
    limit_chunks: Annotated[
        int | None,
        typer.Option(min=1, help="Only the first windows of each text.", show_default=False),
    ] = None,
    tasks: Annotated[
        str | None, typer.Option(help="lm-eval tasks, by commas.", show_default=False)
    ] = None,
    include_path: Annotated[
        str | None, typer.Option(help="Folder of further lm-eval task files.", show_default=False)
    ] = None,
    limit: Annotated[
        int | None,
        typer.Option(min=1, help="Only the first documents of each task.", show_default=False),
    ] = None,
    dtype: RunDtype = "float32",
    speed: Annotated[
        bool,
        typer.Option(
            "--speed/--no-speed", help="Measure tokens a second; all models at once in memory."
        ),
    ] = True,
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Tokens of the prefill.")] = 128,
    new_tokens: Annotated[int, typer.Option(min=1, help="Tokens decoded after it.")] = 16,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds of which the median counts.")] = 5,
    out: Annotated[
        Path | None,
        typer.Option(help="New .html or .json file to write as well.", show_default=False),
    ] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Compare DIRECTORIES, converted or plain: size, perplexity, lm-eval tasks, speed."""
    options = {
        name: value
        for name, value in locals().items()
        if name not in ("directories", "text", "out", "as_json", "debug")
    }
    unwind_when_killed()
    with reporting(as_json, debug) as show:
        from smoothrot_offline.config import make_options
        from smoothrot_offline.console import progress_bar
        from smoothrot_offline.report.compare import ReportConfig, compare
        from smoothrot_offline.report.tables import check_report_file, show_report, write_report

        if out is not None:
            check_report_file(out)
        options |= {"texts": tuple(map(str, text or ())), "tasks": _names(tasks) if tasks else ()}
        with progress_bar() as progress:
            found = compare(directories, make_options(ReportConfig, "report", options), progress)
        if out is not None:
            write_report(found, out)
        show(found.model_dump(mode="json"), show_report(found))


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(","))


def _layer_numbers(text: str) -> tuple[int, ...]:
    """``0,5,10-12`` as numbers."""
    from smoothrot_offline.source.models import MAX_COUNT

    numbers: list[int] = []
    for part in text.split(","):
        first, dash, last = part.partition("-")
        try:
            start, end = int(first), int(last if dash else first)
        except ValueError:
            raise ConfigError(
                f"--layers {text}: expected numbers and ranges like 0,5,10-12, got {part!r}."
            ) from None
        if end > MAX_COUNT:
            raise ConfigError(f"--layers {text}: expected layers of the model, got {end}.")
        numbers += range(start, end + 1)
    return tuple(numbers)
