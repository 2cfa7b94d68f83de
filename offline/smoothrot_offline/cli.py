# SPDX-License-Identifier: Apache-2.0
"""The command ``smoothrot-convert``: plan, run, verify, inspect, lora, eval, analyze, report.

Results go to stdout, everything else to stderr; with ``--json`` stdout is one JSON object. Exit
code 1 is a refusal or a failure, in one line on stderr; 2 is a wrong command line. Heavy imports
wait until a command runs.
"""

import dataclasses
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from smoothrot_offline.cli_analysis import analyze, report
from smoothrot_offline.console import (
    Debug,
    Device,
    Json,
    RunDtype,
    refuse,
    refuse_unsupported,
    reporting,
    telling_how_to_go_on,
    unwind_when_killed,
)
from smoothrot_offline.device import reuse_freed_memory

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


Model = Annotated[
    str, typer.Argument(help="Directory of the model, or its hub id.", show_default=False)
]
Converted = Annotated[Path, typer.Argument(help="Converted directory.", show_default=False)]
PresetOption = Annotated[
    Literal["auto", "fast", "balanced", "best", "paper-compat", "none"],
    typer.Option(
        help=(
            "Recipe: sets the options below that are not given. auto: the best that takes an hour"
            " at most. none: as listed."
        )
    ),
]
WeightBits = Annotated[Literal[4, 8], typer.Option(help="Bits of a weight.")]
ActivationBits = Annotated[Literal[4, 8], typer.Option(help="Bits of an activation.")]
GroupSize = Annotated[
    Literal[-1, 32, 64, 128],
    typer.Option(help="Inputs that share a weight scale; -1: a whole row."),
]
Scales = Annotated[
    Literal["none", "max", "quantile", "l2", "search", "learned"],
    typer.Option(
        help=(
            "Smoothing of down_proj's input: by a statistic, by trying them out, or by gradient"
            " from there."
        )
    ),
]
SmoothNorms = Annotated[
    bool,
    typer.Option(
        "--smooth-norms/--no-smooth-norms", help="Smooth what the norms give out as well, after R1."
    ),
]
Alpha = Annotated[
    float,
    typer.Option(min=0, max=1, help="Share of the difficulty that smoothing moves to the weight."),
]
Quantile = Annotated[
    float, typer.Option(min=0, max=1, help="quantile: of the input's magnitudes in each channel.")
]
Rounding = Annotated[
    Literal["rtn", "gptq", "gptaq"],
    typer.Option(
        help=(
            "Weight rounding: to nearest, error-compensated, or towards the full-precision model as"
            " well."
        )
    ),
]
ActOrder = Annotated[
    bool,
    typer.Option("--act-order/--no-act-order", help="gptq, gptaq: channels of large inputs first."),
]
Propagation = Annotated[
    float, typer.Option(min=0, max=1, help="gptaq: share of earlier layers' error to make up for.")
]
Damping = Annotated[
    float,
    typer.Option(help="gptq, gptaq: added to the Hessian's diagonal, as a fraction of its mean."),
]
ClipSearch = Annotated[
    bool,
    typer.Option(
        "--clip-search/--no-clip-search",
        help="Search the clip of each 4-bit input instead of 0.9 for all.",
    ),
]
Keep8bit = Annotated[
    float,
    typer.Option(
        "--keep-8bit",
        parser=_fraction,
        metavar="auto:FRACTION",
        help=(
            "Share of the weights that stay at 8 bits, with 8-bit inputs: those whose error costs"
            " most."
        ),
    ),
]
SignSeeds = Annotated[
    int, typer.Option(min=1, help="Random-sign seeds to try; the best on held-out text is kept.")
]
HeadBits = Annotated[
    Literal[4, 8, 16],
    typer.Option(
        help="Bits of the head (4: in groups of --group-size); the embedding stays 16-bit."
    ),
]
MaxTp = Annotated[
    int, typer.Option(min=1, help="Largest tensor-parallel size the output must serve.")
]
Calib = Annotated[
    str,
    typer.Option(
        help="Calibration text: a file, 'generated' by the model itself, or a hub data set."
    ),
]
Samples = Annotated[int, typer.Option(min=1, help="Calibration sequences.")]
Seqlen = Annotated[int, typer.Option(min=2, help="Tokens of a calibration sequence.")]
Seed = Annotated[
    int, typer.Option(min=0, help="Seed of the random signs and of the calibration text.")
]
Rotations = Annotated[
    Literal["hadamard", "learned"],
    typer.Option(help="R1 and R2: Hadamard transforms, or learned from there by gradient."),
]
RotationSteps = Annotated[
    int, typer.Option(min=1, help="learned rotations: optimiser steps, the budget of learning.")
]
NoRotate = Annotated[
    bool, typer.Option("--no-rotate", help="No rotation at all, online or offline.")
]
Workers = Annotated[
    int,
    typer.Option(
        min=1,
        help="rtn: processes that convert layers at the same time; each holds a layer in memory.",
    ),
]
ShardMib = Annotated[
    int, typer.Option(min=1, help="Largest output shard, MiB; it is also held in memory.")
]


@app.command()
def run(
    context: typer.Context,
    model: Model,
    out: Annotated[
        Path,
        typer.Argument(
            help="Directory to make; it appears when it is complete.", show_default=False
        ),
    ],
    preset: PresetOption = "auto",
    weight_bits: WeightBits = 4,
    activation_bits: ActivationBits = 4,
    group_size: GroupSize = -1,
    scales: Scales = "l2",
    smooth_norms: SmoothNorms = False,
    alpha: Alpha = 0.5,
    quantile: Quantile = 0.999,
    rounding: Rounding = "rtn",
    act_order: ActOrder = True,
    damping: Damping = 0.01,
    propagation: Propagation = 0.5,
    clip_search: ClipSearch = False,
    keep_8bit: Keep8bit = 0.0,
    sign_seeds: SignSeeds = 1,
    lm_head_bits: HeadBits = 16,
    max_tp: MaxTp = 1,
    calib: Calib = "generated",
    calib_samples: Samples = 64,
    calib_seqlen: Seqlen = 512,
    seed: Seed = 0,
    no_rotate: NoRotate = False,
    rotations: Rotations = "hadamard",
    rotation_steps: RotationSteps = 150,
    shard_mib: ShardMib = 1024,
    workers: Workers = 1,
    device: Device = "auto",
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Convert MODEL into the new directory OUT."""
    options = _explicit(context, locals())
    unwind_when_killed()
    with reporting(as_json, debug) as show:
        refuse_unsupported(model)
        from smoothrot_offline.check.admit import admit
        from smoothrot_offline.console import progress_bar
        from smoothrot_offline.convert import convert
        from smoothrot_offline.device import choose_device
        from smoothrot_offline.presets import choose_preset
        from smoothrot_offline.report.tables import show_conversion
        from smoothrot_offline.source.checkpoint import open_checkpoint
        from smoothrot_offline.source.headers import resolve_source

        chosen_device = choose_device(device, workers)
        source = resolve_source(model)
        checkpoint = open_checkpoint(source)
        choice = choose_preset(preset, options, checkpoint)
        notes = admit(checkpoint, choice.config, workers, chosen_device.device).notes
        print(f"{choice.reason}: {choice.config.described()}", file=sys.stderr)
        print(f"device: {chosen_device.described}", file=sys.stderr)
        for note in (*choice.notes, *notes):
            print(f"note: {note}", file=sys.stderr)
        with telling_how_to_go_on(out), progress_bar() as progress:
            done = convert(source, out, choice.config, progress, workers, chosen_device.device)
        if done.resumed_layers is not None:
            print(
                f"went on after {done.resumed_layers} finished layers of an interrupted run",
                file=sys.stderr,
            )
        chosen = {"preset": choice.reason, "config": choice.config.model_dump()}
        show(done.summary() | chosen | {"output": str(out)}, show_conversion(done, str(out)))


@app.command()
def plan(
    context: typer.Context,
    model: Model,
    preset: PresetOption = "auto",
    weight_bits: WeightBits = 4,
    activation_bits: ActivationBits = 4,
    group_size: GroupSize = -1,
    scales: Scales = "l2",
    smooth_norms: SmoothNorms = False,
    alpha: Alpha = 0.5,
    quantile: Quantile = 0.999,
    rounding: Rounding = "rtn",
    act_order: ActOrder = True,
    damping: Damping = 0.01,
    propagation: Propagation = 0.5,
    clip_search: ClipSearch = False,
    keep_8bit: Keep8bit = 0.0,
    sign_seeds: SignSeeds = 1,
    lm_head_bits: HeadBits = 16,
    max_tp: MaxTp = 1,
    calib: Calib = "generated",
    calib_samples: Samples = 64,
    calib_seqlen: Seqlen = 512,
    seed: Seed = 0,
    no_rotate: NoRotate = False,
    rotations: Rotations = "hadamard",
    rotation_steps: RotationSteps = 150,
    shard_mib: ShardMib = 1024,
    device: Device = "auto",
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Say what run would do, from MODEL's configuration and headers alone; exit code 1 if run
    would refuse."""
    options = _explicit(context, locals())
    with reporting(as_json, debug) as show:
        refuse_unsupported(model)
        from smoothrot_offline.check.plan import plan_conversion
        from smoothrot_offline.device import choose_device
        from smoothrot_offline.presets import choose_preset
        from smoothrot_offline.report.tables import show_plan
        from smoothrot_offline.source.checkpoint import open_headers

        chosen_device = choose_device(device)
        headers = open_headers(model)
        choice = choose_preset(preset, options, headers)
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
        from smoothrot_offline.console import progress_bar
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
    """Summarise the converted DIRECTORY."""
    with reporting(as_json, debug) as show:
        from smoothrot_offline.check.inspect import inspect as inspect_directory
        from smoothrot_offline.report.tables import show_inspection

        found = inspect_directory(directory)
        show(found.model_dump(mode="json"), show_inspection(found))


@app.command()
def lora(
    adapter: Annotated[
        Path, typer.Argument(help="PEFT LoRA adapter of the original model.", show_default=False)
    ],
    out: Annotated[
        Path,
        typer.Argument(
            help="Directory to make; it appears when it is complete.", show_default=False
        ),
    ],
    base: Annotated[
        Path,
        typer.Option(
            help="Converted directory that the adapter will be served with.", show_default=False
        ),
    ],
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Transform ADAPTER, trained on the original model, into the adapter OUT of a converted one."""
    with reporting(as_json, debug) as show:
        from smoothrot_offline.transform.lora import convert_adapter

        done = convert_adapter(adapter, out, base)
        show(done.summary(), f"{out}: {done.linears} linears of {done.layers} layers, for {base}")


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


app.command()(analyze)
app.command()(report)


def main() -> None:
    """Entry point of the console script."""
    reuse_freed_memory()
    app()


def _explicit(context: typer.Context, arguments: dict[str, Any]) -> dict[str, Any]:
    """Fields of the conversion's configuration that the command line gives; the others are the
    preset's to set."""
    # By name: typer has a click of its own, whose enumeration is not the installed one's.
    sources = {
        name: getattr(context.get_parameter_source(name), "name", None) for name in arguments
    }
    given = {
        name: value
        for name, value in arguments.items()
        if name not in ("model", "out", "preset") and sources[name] == "COMMANDLINE"
    }
    for option in ("as_json", "debug", "workers", "device"):
        given.pop(option, None)
    if given.pop("no_rotate", False):
        given["rotate"] = False
    return given


if __name__ == "__main__":
    main()
