# SPDX-License-Identifier: Apache-2.0
"""The command ``smoothrot-convert`` and its verbs.

Results go to stdout, everything else to stderr; with ``--json`` stdout is one JSON object. Exit
code 1 is a refusal or a failure, in one line on stderr; 2 is a wrong command line. Heavy imports
wait until a command runs.
"""

import dataclasses
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from smoothrot_offline.config import AnalysisConfig, ConvertConfig, ReportConfig, make_options
from smoothrot_offline.console import (
    Debug,
    Device,
    Json,
    RunDtype,
    exit_on_sigterm,
    explain_resuming,
    options_of,
    progress_bar,
    refuse,
    refuse_unsupported,
    reporting,
    reuse_freed_memory,
)
from smoothrot_vllm.errors import ConfigError

app = typer.Typer(
    name="smoothrot-convert",
    help="Convert Hugging Face checkpoints to SmoothRot INT4 and check the result.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _fraction(value: str | float) -> float:
    """The number in ``auto:FRACTION``."""
    _, _, number = str(value).rpartition("auto:")
    try:
        return float(number)
    except ValueError:
        raise typer.BadParameter(
            f"expected auto:FRACTION, such as auto:0.1, got {value!r}"
        ) from None


def _argument(text: str) -> Any:
    return typer.Argument(help=text, show_default=False)


Model = Annotated[str, _argument("Directory of the model, or its hub id.")]
Out = Annotated[Path, _argument("Directory to make; it appears when it is complete.")]
Converted = Annotated[Path, _argument("Converted directory.")]
Base = Annotated[
    Path,
    typer.Option(help="Converted directory that it will be served with.", show_default=False),
]
PresetOption = Annotated[
    Literal["auto", "fast", "balanced", "best", "paper-compat", "none"],
    typer.Option(
        help=(
            "Recipe: sets the options below that are not given. auto: the best that takes an hour"
            " at most. none: as listed."
        )
    ),
]
Workers = Annotated[
    int,
    typer.Option(
        min=1,
        help="rtn: processes that convert layers at the same time; each holds a layer in memory.",
    ),
]
_conversion_options = options_of(
    ConvertConfig, keep_8bit={"parser": _fraction, "metavar": "auto:FRACTION"}
)


@app.command()
@_conversion_options
def run(
    context: typer.Context,
    model: Model,
    out: Out,
    preset: PresetOption = "auto",
    workers: Workers = 1,
    device: Device = "auto",
    as_json: Json = False,
    debug: Debug = False,
    **options: Any,
) -> None:
    """Convert MODEL into the new directory OUT."""
    given = _given(context, options)
    exit_on_sigterm()
    with reporting(as_json, debug, over_ranks=True) as show:
        refuse_unsupported(model)
        from smoothrot_offline.check.admit import admit
        from smoothrot_offline.convert import convert
        from smoothrot_offline.device import choose_device
        from smoothrot_offline.presets import choose_preset
        from smoothrot_offline.report.tables import show_conversion
        from smoothrot_offline.source.checkpoint import open_checkpoint
        from smoothrot_offline.source.headers import resolve_source

        chosen_device = choose_device(device, workers)
        source = resolve_source(model)
        checkpoint = open_checkpoint(source)
        choice = choose_preset(preset, given, checkpoint)
        notes = admit(checkpoint, choice.config, workers, chosen_device.device).notes
        print(f"{choice.reason}: {choice.config.described()}", file=sys.stderr)
        print(f"device: {chosen_device.described}", file=sys.stderr)
        for note in (*choice.notes, *notes):
            print(f"note: {note}", file=sys.stderr)
        with explain_resuming(out), progress_bar() as progress:
            done = convert(source, out, choice.config, progress, workers, chosen_device.device)
        if done.resumed_layers is not None:
            print(
                f"went on after {done.resumed_layers} finished layers of an interrupted run",
                file=sys.stderr,
            )
        chosen = {"preset": choice.reason, "config": choice.config.model_dump()}
        show(done.summary() | chosen | {"output": str(out)}, show_conversion(done, str(out)))


@app.command()
@_conversion_options
def plan(
    context: typer.Context,
    model: Model,
    preset: PresetOption = "auto",
    device: Device = "auto",
    as_json: Json = False,
    debug: Debug = False,
    **options: Any,
) -> None:
    """Say what run would do, from MODEL's configuration and headers alone; exit code 1 if run
    would refuse."""
    given = _given(context, options)
    with reporting(as_json, debug) as show:
        refuse_unsupported(model)
        from smoothrot_offline.check.plan import plan_conversion
        from smoothrot_offline.device import choose_device
        from smoothrot_offline.presets import choose_preset
        from smoothrot_offline.report.tables import show_plan
        from smoothrot_offline.source.checkpoint import open_headers

        chosen_device = choose_device(device)
        headers = open_headers(model)
        choice = choose_preset(preset, given, headers)
        found = plan_conversion(headers, choice.config, chosen_device.device)
        facts = found.model_dump(mode="json") | {"notes": [*choice.notes, *found.notes]}
        if found.architecture is not None:
            facts |= {"preset": choice.reason, "config": choice.config.model_dump()}
        show(facts, show_plan(found, choice))
        refuse(found.refusals)


@app.command()
def verify(
    directory: Converted,
    source: Annotated[
        str | None,
        typer.Option(
            help="Also derive a sample of the codes from this model, path or hub id.",
            show_default=False,
        ),
    ] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Check every byte of DIRECTORY against its schema and manifest; exit code 1 if anything
    differs."""
    with reporting(as_json, debug) as show:
        from smoothrot_offline.check.verify import compare_with_source
        from smoothrot_offline.check.verify import verify as verify_directory
        from smoothrot_offline.source.headers import resolve_source

        with progress_bar() as progress:
            found = verify_directory(directory, progress)
        summary = (
            f"{directory}: {found.tensors} tensors and {found.files} files are the ones that were"
            " written"
        )
        facts, problems = found.model_dump(mode="json"), found.problems
        # Codes are derived again only from whole ones.
        if source is not None and found.ok:
            compared = compare_with_source(directory, resolve_source(source))
            facts |= {"ok": not compared.problems, "source": compared.model_dump(mode="json")}
            problems = compared.problems
            summary += (
                f"; against {source}: layers {', '.join(map(str, compared.layers)) or 'none'},"
                f" codes of {compared.codes} linears and weight errors of {compared.errors}"
            )
        show(facts, f"{directory}: {len(problems)} problem(s)" if problems else summary)
        refuse(problems)


@app.command()
def inspect(directory: Converted, as_json: Json = False, debug: Debug = False) -> None:
    """Summarize the converted DIRECTORY."""
    with reporting(as_json, debug) as show:
        from smoothrot_offline.check.inspect import inspect as inspect_directory
        from smoothrot_offline.report.tables import show_inspection

        found = inspect_directory(directory)
        show(found.model_dump(mode="json"), show_inspection(found))


@app.command()
def lora(
    adapter: Annotated[Path, _argument("PEFT LoRA adapter of the original model.")],
    out: Out,
    base: Base,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Transform ADAPTER, trained on the original model, into the adapter OUT of a converted one."""
    with reporting(as_json, debug) as show:
        from smoothrot_offline.transform.lora import convert_adapter

        done = convert_adapter(adapter, out, base)
        show(done.summary(), f"{out}: {done.linears} linears of {done.layers} layers, for {base}")


@app.command()
def draft(
    head: Annotated[Path, _argument("EAGLE head of the original model.")],
    out: Out,
    base: Base,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Transform HEAD, trained on the original model, into the draft head OUT of a converted one."""
    with reporting(as_json, debug) as show:
        from smoothrot_offline.transform.draft import convert_head

        done = convert_head(head, out, base)
        show(done.summary(), f"{out}: a head of {done.layers} layer(s), for {base}")


@app.command("eval")
def evaluate(
    directory: Annotated[
        str, typer.Argument(help="Any Hugging Face or SmoothRot directory.", show_default=False)
    ],
    text: Annotated[
        Path, typer.Option(help="UTF-8 text, or .jsonl of texts or chats.", show_default=False)
    ],
    seqlen: Annotated[int, typer.Option(min=2, help="Tokens of a window.")] = 2048,
    limit_chunks: Annotated[
        int | None, typer.Option(min=1, help="Only the first windows.", show_default=False)
    ] = None,
    dtype: RunDtype = "float32",
    device: Device = "auto",
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Perplexity of DIRECTORY on a text, in windows that do not overlap, tail included."""
    with reporting(as_json, debug) as show:
        from smoothrot_offline.device import choose_device
        from smoothrot_offline.report.evaluate import evaluate_perplexity, run_dtype
        from smoothrot_offline.source.headers import resolve_source

        chosen = choose_device(device)
        print(f"device: {chosen.described}", file=sys.stderr)
        found = evaluate_perplexity(
            resolve_source(directory), text, seqlen, limit_chunks, run_dtype(dtype), chosen.device
        )
        summary = (
            f"perplexity {found.perplexity:.4f} over {found.tokens} tokens in {found.dtype},"
            f" {found.seconds:.0f} s"
        )
        show(dataclasses.asdict(found), summary)


_BY_COMMAS = {"annotation": str | None, "default": None}


@app.command()
@options_of(AnalysisConfig, policies=_BY_COMMAS, layers=_BY_COMMAS)
def analyze(
    model: Model,
    out: Out,
    device: Device = "auto",
    as_json: Json = False,
    debug: Debug = False,
    **options: Any,
) -> None:
    """Measure how hard each layer of MODEL is to quantize, before and after each transform, into
    the new directory OUT."""
    exit_on_sigterm()
    with reporting(as_json, debug) as show:
        refuse_unsupported(model)
        from smoothrot_offline.device import choose_device
        from smoothrot_offline.report.analyze import analyze as analyze_model
        from smoothrot_offline.report.tables import show_analysis
        from smoothrot_offline.source.headers import resolve_source

        for name, read in (("policies", _names), ("layers", _layer_numbers)):
            given = options.pop(name)
            if given is not None:
                options[name] = read(given)
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


@app.command()
@options_of(ReportConfig, tasks=_BY_COMMAS)
def report(
    directories: Annotated[
        list[Path],
        typer.Argument(help="Directories; speeds are compared with the first.", show_default=False),
    ],
    text: Annotated[
        list[Path] | None,
        typer.Option(
            help="Text for perplexity: UTF-8, or .jsonl of texts or chats. Repeatable.",
            show_default=False,
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="New .html or .json file to write as well.", show_default=False),
    ] = None,
    as_json: Json = False,
    debug: Debug = False,
    **options: Any,
) -> None:
    """Compare DIRECTORIES, converted or plain: size, perplexity, lm-eval tasks, speed."""
    exit_on_sigterm()
    with reporting(as_json, debug) as show:
        from smoothrot_offline.report.compare import compare
        from smoothrot_offline.report.tables import check_report_file, show_report, write_report

        if out is not None:
            check_report_file(out)
        options["texts"] = tuple(map(str, text or ()))
        options["tasks"] = _names(options["tasks"]) if options["tasks"] else ()
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


def main() -> None:
    """Entry point of the console script."""
    reuse_freed_memory()
    app()


def _given(context: typer.Context, options: dict[str, Any]) -> dict[str, Any]:
    """The options that the command line gives; the others are the preset's to set."""
    # By name: typer has a click of its own, whose enumeration is not the installed one's.
    return {
        name: value
        for name, value in options.items()
        if getattr(context.get_parameter_source(name), "name", None) == "COMMANDLINE"
    }


if __name__ == "__main__":
    main()
