# SPDX-License-Identifier: Apache-2.0
"""Perplexity, size, time and peak memory of each recipe on one model, as a user's commands produce
them.

    python -m benchmarks.conversion.accuracy MODEL_DIR --text TEST.raw C4.jsonl --calib VALID.raw \\
        --json FILE

Every row runs ``smoothrot-convert run`` and ``report`` in processes of their own. ``--peer`` adds a
row of a model that another tool has quantized, such as the one of
``benchmarks/serving/gptq_peer.py``. Rows already in the output file are kept, so an interrupted run
goes on where it stopped; a file made with other inputs is refused.
"""

import argparse
import hashlib
import json
import statistics
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks.support.commands import options, smoothrot_convert
from benchmarks.support.machine import machine
from benchmarks.support.packaged_models import weight_bytes
from benchmarks.support.report import save


@dataclass(frozen=True)
class Recipe:
    """A named set of ``smoothrot-convert run`` options; ``seeded`` where random signs move the
    result."""

    name: str
    options: tuple[str, ...]
    seeded: bool = True


SIXTEEN_BIT = "16-bit"
PLAIN = ("--scales", "none", "--no-rotate")
QUAROT = ("--scales", "none")
W4A4 = ("--weight-bits", "4", "--activation-bits", "4")
W4A8 = ("--weight-bits", "4", "--activation-bits", "8")
L2_RTN = ("--preset", "none", *W4A4, "--scales", "l2", "--rounding", "rtn")
POLICIES = ("max", "quantile", "l2", "search", "learned")
POLICIES_WITH_NORMS = ("l2", "search")
NORMS = ("--smooth-norms",)
QUAROT_RTN = ("--preset", "none", *W4A4, *QUAROT, "--rounding", "rtn")
PER_CHANNEL = ("--group-size", "-1", "--keep-8bit", "auto:0")
NOT_DISTILLED = ("--distill-steps", "0")
LEARNED = ("--rotations", "learned", "--rotation-steps", "32")
SHARDS = (2, 4, 8)


def _rounded(rounding: str) -> tuple[Recipe, ...]:
    """QuaRot and SmoothRot with every policy, all W4A4 per channel."""
    options = ("--preset", "none", *W4A4, "--rounding", rounding)
    name = rounding.upper()
    return (
        Recipe(f"W4A4 QuaRot {name}", (*options, *QUAROT)),
        *(
            Recipe(f"W4A4 SmoothRot {policy} {name}", (*options, "--scales", policy))
            for policy in POLICIES
        ),
        *(
            Recipe(
                f"W4A4 SmoothRot {policy} {name}, norms smoothed",
                (*options, "--scales", policy, *NORMS),
            )
            for policy in POLICIES_WITH_NORMS
        ),
    )


def _blocks() -> tuple[Recipe, ...]:
    """Rounding to nearest with the rotation of down_proj's input in as many blocks as
    ``--max-tp`` asks for."""
    base = ("--preset", "none", *W4A4, "--rounding", "rtn")
    kinds = {"QuaRot": "none", "SmoothRot max": "max", "SmoothRot l2": "l2"}
    return tuple(
        Recipe(
            f"W4A4 {kind} RTN, {shards} blocks",
            (*base, "--scales", scales, "--max-tp", str(shards)),
        )
        for shards in SHARDS
        for kind, scales in kinds.items()
    )


def _steps(activations: str, bits: tuple[str, ...]) -> tuple[Recipe, ...]:
    """From the best per-channel recipe to the best preset, one option after the other."""
    base = ("--preset", "none", *bits, "--scales", "l2", *NORMS, "--rounding", "gptaq")
    best = ("--preset", "best", *bits)
    # What the preset does not do about the norms: it smooths them for 4-bit activations only.
    other = ("norms smoothed", NORMS)
    if activations == "W4A4":
        other = ("norms not smoothed", ("--no-smooth-norms",))
    changes = (
        ("QuaRot in place of SmoothRot", QUAROT),
        ("not smoothed", (*QUAROT, "--no-smooth-norms")),
        other,
        ("GPTAQ, scales search", ("--rounding", "gptaq", "--scales", "search")),
        ("tokens counted alike", ("--hessian", "layer")),
        ("output channels together", ("--hessian", "model")),
        ("learned rotations", LEARNED),
        ("not distilled", NOT_DISTILLED),
        ("per channel, no 8-bit layers", PER_CHANNEL),
        ("per channel, no 8-bit layers, not distilled", (*PER_CHANNEL, *NOT_DISTILLED)),
        (
            "per channel, no 8-bit layers, not distilled, learned rotations",
            (*PER_CHANNEL, *NOT_DISTILLED, *LEARNED),
        ),
    )
    return (
        *(
            Recipe(
                f"{activations} GPTAQ l2, norms smoothed, groups of {group}",
                (*base, "--group-size", str(group)),
            )
            for group in (128, 64, 32)
        ),
        *(
            Recipe(f"{activations} preset {preset}", ("--preset", preset, *bits))
            for preset in ("fast", "balanced", "best")
        ),
        *(Recipe(f"{activations} preset best, {what}", (*best, *words)) for what, words in changes),
    )


RECIPES = (
    Recipe("W4A8 RTN", ("--preset", "none", *W4A8, *PLAIN), seeded=False),
    Recipe("W4A8 QuaRot RTN", ("--preset", "none", *W4A8, *QUAROT)),
    Recipe("W4A8 SmoothRot l2 RTN", ("--preset", "none", *W4A8, "--scales", "l2")),
    *_steps("W4A8", W4A8),
    Recipe("W4A4 RTN", ("--preset", "none", *W4A4, *PLAIN), seeded=False),
    *_rounded("rtn"),
    Recipe("W4A4 QuaRot RTN, best of 8 sign seeds", (*QUAROT_RTN, "--sign-seeds", "8")),
    Recipe("W4A4 SmoothRot l2 RTN, best of 8 sign seeds", (*L2_RTN, "--sign-seeds", "8")),
    Recipe(
        "W4A4 SmoothRot l2 RTN, norms smoothed, best of 8 sign seeds",
        (*L2_RTN, *NORMS, "--sign-seeds", "8"),
    ),
    Recipe("W4A4 SmoothRot l2 RTN, learned rotations", (*L2_RTN, *LEARNED)),
    Recipe(
        "W4A4 SmoothRot l2 RTN, norms smoothed, learned rotations",
        (*L2_RTN, *NORMS, *LEARNED),
    ),
    *_blocks(),
    *_rounded("gptq"),
    *_rounded("gptaq"),
    Recipe("W4A4 preset paper-compat", ("--preset", "paper-compat", *W4A4)),
    *_steps("W4A4", W4A4),
)


def main() -> None:
    """Fill the table's missing rows and print it."""
    arguments = parse_arguments()
    results = Results(arguments.json, problem_of(arguments))
    if not results.has(SIXTEEN_BIT, None):
        row = {"recipe": SIXTEEN_BIT, "seed": None, "bytes": weight_bytes(arguments.model)}
        results.add(row | evaluated(arguments.model, arguments))
    for name, directory in arguments.peer:
        if not results.has(name, None):
            row = {"recipe": name, "seed": None, "bytes": weight_bytes(Path(directory))}
            results.add(row | evaluated(Path(directory), arguments))
    for recipe in RECIPES:
        if arguments.only and recipe.name not in arguments.only:
            continue
        for seed in arguments.seeds if recipe.seeded else arguments.seeds[:1]:
            if not results.has(recipe.name, seed):
                results.add(measured(recipe, seed, arguments))
    print(results.table())


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("model", type=Path, help="directory of the 16-bit model")
    add("--text", type=Path, required=True, nargs="+", help="texts to evaluate on")
    add("--tasks", help="lm-eval tasks, by commas")
    add("--include-path", type=Path, help="folder of further lm-eval task files")
    add("--limit", type=int, help="only the first documents of each task")
    add("--calib", required=True, help="calibration text: a file, or 'generated'")
    add("--json", type=Path, required=True, help="file to make or to go on with")
    add("--seqlen", type=int, default=2048)
    add("--limit-chunks", type=int, help="only the first windows of each text")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2])
    add("--peer", nargs=2, metavar=("NAME", "DIR"), action="append", default=[])
    names = [recipe.name for recipe in RECIPES]
    add("--only", nargs="+", choices=names, help="only these recipes")
    return parser.parse_args()


def problem_of(arguments: argparse.Namespace) -> dict[str, Any]:
    """What rows must share to be comparable."""
    calibration = (
        arguments.calib if arguments.calib == "generated" else digest([Path(arguments.calib)])
    )
    return {
        "model": digest(sorted(arguments.model.glob("*.safetensors"))),
        "texts": {text.name: digest([text]) for text in arguments.text},
        "tasks": arguments.tasks,
        "limit": arguments.limit,
        "calibration": calibration,
        "seqlen": arguments.seqlen,
        "limit_chunks": arguments.limit_chunks,
    }


def digest(files: Iterable[Path]) -> str:
    """SHA-256 of the files' contents one after the other."""
    total = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            total.update(hashlib.file_digest(file, "sha256").digest())
    return total.hexdigest()


class Results:
    """The JSON file: rewritten after every row, never half-written."""

    def __init__(self, path: Path, problem: dict[str, Any]) -> None:
        self.path = path
        packages = {name: version(name) for name in ("torch", "transformers", "smoothrot-vllm")}
        self.content: dict[str, Any] = {
            "problem": problem,
            "device": machine(),
            "packages": packages,
            "results": [],
        }
        if path.exists():
            found = json.loads(path.read_text())
            if (found["problem"], found["packages"]) != (problem, packages):
                sys.exit(
                    f"error: {path} holds rows for {found['problem']} with {found['packages']};"
                    f" this run has {problem} with {packages}. Choose another --json, or the same"
                    " inputs."
                )
            self.content = found

    @property
    def rows(self) -> list[dict[str, Any]]:
        """Every row so far."""
        return self.content["results"]

    def has(self, recipe: str, seed: int | None) -> bool:
        """Whether a row is there already."""
        return any((row["recipe"], row["seed"]) == (recipe, seed) for row in self.rows)

    def add(self, row: dict[str, Any]) -> None:
        """Append a row to the file."""
        self.rows.append(row)
        save(self.content, self.path)
        found = ", ".join(f"{text} {value:.2f}" for text, value in row["perplexity"].items())
        print(f"{row['recipe']}, seed {row['seed']}: {found}", file=sys.stderr)

    def table(self) -> str:
        """Markdown: one line a recipe; a value is the mean over its seeds, with the smallest and
        the largest."""
        texts = self.content["problem"]["texts"]
        tasks = [f"{score['task']} {score['metric']}" for score in self.rows[0]["tasks"]]
        names = [word for text in texts for word in (text, "to 16-bit")] + tasks
        lines = [
            f"| recipe | {' | '.join(names)} | MB | convert s | CPU s | peak GB |",
            "|---" * (len(names) + 5) + "|",
        ]
        base = next(row["perplexity"] for row in self.rows if row["recipe"] == SIXTEEN_BIT)
        for name in dict.fromkeys(row["recipe"] for row in self.rows):
            rows = [row for row in self.rows if row["recipe"] == name]
            cells = [name]
            for text in texts:
                values = [row["perplexity"][text] for row in rows]
                cells += [_spread(values), f"{statistics.mean(values) / base[text]:.3f}x"]
            for number in range(len(tasks)):
                scores = [row["tasks"][number] for row in rows]
                mean = statistics.mean(score["value"] for score in scores)
                error = scores[0]["standard_error"]
                cells.append(f"{100 * mean:.1f}" + (f" ± {100 * error:.1f}" if error else ""))
            cells.append(f"{rows[0]['bytes'] / 1e6:.0f}")
            if "convert_seconds" in rows[0]:
                seconds, cpu_seconds, memory = (
                    statistics.mean(row[f"convert_{what}"] for row in rows)
                    for what in ("seconds", "cpu_seconds", "peak_bytes")
                )
                cells += [f"{seconds:.0f}", f"{cpu_seconds:.0f}", f"{memory / 1e9:.2f}"]
            else:
                cells += [""] * 3
            lines.append(f"| {' | '.join(cells)} |")
        return "\n".join(lines)


def _spread(values: list[float]) -> str:
    """Mean, and the range of several."""
    several = f" ({min(values):.2f} to {max(values):.2f})" if len(values) > 1 else ""
    return f"{statistics.mean(values):.2f}{several}"


def measured(recipe: Recipe, seed: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """Convert into a temporary directory, evaluate it, and describe both."""
    with tempfile.TemporaryDirectory(prefix="smoothrot-accuracy-") as work:
        out = Path(work) / "model"
        words = [*recipe.options, "--seed", str(seed)]
        # Where the calibration text lies is no part of a result; its digest is in the problem.
        calibration = ("--calib", arguments.calib)
        _, cost = smoothrot_convert("run", str(arguments.model), str(out), *words, *calibration)
        row = {"recipe": recipe.name, "seed": seed, "options": words, "bytes": weight_bytes(out)}
        row |= {f"convert_{what}": amount for what, amount in cost.items()}
        return row | evaluated(out, arguments)


def evaluated(directory: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Perplexities and scores of a directory, and what measuring them took."""
    names = ("seqlen", "limit_chunks", "tasks", "include_path", "limit")
    words = options(**{name: getattr(arguments, name) for name in names})
    for text in arguments.text:
        words += ["--text", str(text)]
    found, cost = smoothrot_convert("report", str(directory), *words, "--no-speed")
    (record,) = found["directories"]
    return {
        "perplexity": {name: text["perplexity"] for name, text in record["perplexity"].items()},
        "tasks": record["tasks"],
        "eval_seconds": cost["seconds"],
    }


if __name__ == "__main__":
    main()
