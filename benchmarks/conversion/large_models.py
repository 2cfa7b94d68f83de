# SPDX-License-Identifier: Apache-2.0
"""What converting large models takes: a plan for a 70B-shaped model, and an 8B-shaped one converted
from end to end.

The 70B-shaped source is all holes (sparse files), as a plan reads headers alone. The 8B-shaped one
is random and really on the disk: 16 GB, and 6 GB of output, both removed afterwards. Weights are
rounded to nearest, W4A8, without smoothing, so that the model is never run: this measures reading,
folding, rounding, hashing and writing.

    python -m benchmarks.conversion.large_models --workers 1 2 --json convert.json
"""

import argparse
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.support.commands import smoothrot_convert
from benchmarks.support.machine import machine, packages
from benchmarks.support.random_models import SHAPES, make_model
from benchmarks.support.report import save

OPTIONS = ("--preset", "none", "--scales", "none", "--activation-bits", "8")


def main() -> None:
    """Measure and write the result."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--layers", type=int, default=32, help="decoder layers of the 8B-shaped model")
    workers = "a conversion with each of these numbers of processes"
    add("--workers", type=int, nargs="+", default=[1], help=workers)
    add("--folder", type=Path, help="where to make the models; default: the temporary folder")
    add("--json", type=Path, help="file of the result")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        folder = Path(name)
        planned = plan(make_model(folder / "70b", SHAPES["70b"], random=False))
        source = make_model(
            folder / "8b", SHAPES["8b"] | {"num_hidden_layers": arguments.layers}, random=True
        )
        result = {
            "problem": {
                "options": list(OPTIONS),
                "plan": SHAPES["70b"],
                "run": read_config(source),
            },
            "device": machine(),
            "packages": packages(),
            "result": {
                "plan": planned,
                "runs": [convert(source, folder / "out", workers) for workers in arguments.workers],
            },
        }
    save(result, arguments.json)
    print(json.dumps(result, indent=1))


def plan(source: Path) -> dict[str, Any]:
    """The plan's figures; its seconds are for this machine as it is now."""
    facts, used = smoothrot_convert("plan", str(source), *OPTIONS)
    names = ("refusals", "layers", "source_bytes", "output_bytes", "memory_bytes", "seconds")
    return {name: facts[name] for name in names} | {"planning": used}


def convert(source: Path, out: Path, workers: int) -> dict[str, Any]:
    """Seconds, processor seconds and peak memory of a conversion, and the same for each billion of
    parameters.

    The memory is that of the largest process; the plan's time and memory are those of one process.
    """
    planned, _ = smoothrot_convert("plan", str(source), *OPTIONS)
    facts, used = smoothrot_convert(
        "run", str(source), str(out), *OPTIONS, "--workers", str(workers)
    )
    billions = sum(file.stat().st_size for file in source.glob("*.safetensors")) / 2e9
    shutil.rmtree(out)
    return {
        "workers": workers,
        "billion_parameters": round(billions, 3),
        **used,
        "wall_seconds_per_billion": round(used["seconds"] / billions, 2),
        "cpu_seconds_per_billion": round(used["cpu_seconds"] / billions, 2),
        "planned_seconds": planned["seconds"],
        "planned_memory_bytes": planned["memory_bytes"],
        "output_bytes": facts["output_bytes"],
    }


def read_config(source: Path) -> dict[str, Any]:
    """Sizes of the model that is converted."""
    config = json.loads((source / "config.json").read_text())
    return {name: config[name] for name in SHAPES["8b"]}


if __name__ == "__main__":
    main()
