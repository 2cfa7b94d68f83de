# SPDX-License-Identifier: Apache-2.0
"""The commands ``analyze`` and ``report`` of ``smoothrot-convert``."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from smoothrot_offline.cli_output import Debug, Json, reporting, unwind_when_killed
from smoothrot_vllm.errors import ConfigError

Model = Annotated[str, typer.Argument(help="Directory of the 16-bit model, or its hub id.", show_default=False)]
Out = Annotated[Path, typer.Argument(help="Directory to make; it appears when it is complete.", show_default=False)]
Calib = Annotated[str, typer.Option(help="Calibration text: a file, 'generated' by the model itself, or a hub data set.")]
Samples = Annotated[int, typer.Option(min=1, help="Sequences that scales are chosen from; as many others measure.")]
Seqlen = Annotated[int, typer.Option(min=2, help="Tokens of a sequence.")]
Seed = Annotated[int, typer.Option(min=0, help="Seed of the random signs and of the calibration text.")]
Policies = Annotated[
    str | None, typer.Option(help="Smoothing policies to compare with max, by commas; all of them if absent.", show_default=False)
]
Layers = Annotated[str | None, typer.Option(help="Only these layers: 0,5,10-12.", show_default=False)]


def analyze(
    model: Model,
    out: Out,
    calib: Calib = "generated",
    calib_samples: Samples = 8,
    calib_seqlen: Seqlen = 512,
    seed: Seed = 0,
    policies: Policies = None,
    layers: Layers = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Measure how hard each layer of MODEL is to quantise, before and after each transform, into the new directory OUT."""
    unwind_when_killed()
    with reporting(as_json, debug) as show:
        from smoothrot_offline.analysis import analyze as analyze_model
        from smoothrot_offline.analysis import make_analysis_config
        from smoothrot_offline.analysis.display import show_analysis
        from smoothrot_offline.checkpoint import resolve_source
        from smoothrot_offline.progress import progress_bar

        options = {"calib": calib, "calib_samples": calib_samples, "calib_seqlen": calib_seqlen, "seed": seed}
        chosen = {} if policies is None else {"policies": tuple(name.strip() for name in policies.split(","))}
        config = make_analysis_config(**options, **chosen, layers=None if layers is None else _layer_numbers(layers))
        with progress_bar() as progress:
            found, removed = analyze_model(resolve_source(model), out, config, progress)
        for leftover in removed:
            print(f"removed {leftover}, left by an analysis that was killed", file=sys.stderr)
        show(found.model_dump(mode="json"), show_analysis(found, str(out)))


def _layer_numbers(text: str) -> tuple[int, ...]:
    """``0,5,10-12`` as numbers."""
    numbers: list[int] = []
    for part in text.split(","):
        first, dash, last = part.partition("-")
        try:
            numbers += range(int(first), int(last if dash else first) + 1)
        except ValueError:
            raise ConfigError(f"--layers {text}: expected numbers and ranges like 0,5,10-12, got {part!r}.") from None
    return tuple(numbers)
