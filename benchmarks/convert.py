#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""What converting large models takes: a plan for a 70B-shaped model, and an 8B-shaped one converted
from end to end.

The 70B-shaped source is all holes (sparse files), as a plan reads headers alone. The 8B-shaped one
is random and really on the
disk: 16 GB, and 6 GB of output, both removed afterwards. Weights are rounded to nearest, W4A8,
without smoothing, so that the
model is never run: this measures reading, folding, rounding, hashing and writing.

usage: convert.py [--layers N] [--workers N ...] [--folder DIR] [--out FILE]
"""

import argparse
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from common import machine, packages

SHAPES: dict[str, dict[str, Any]] = {
    "1b": {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "tie_word_embeddings": True,
    },
    "8b": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
    },
    "70b": {
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
    },
}
COMMON = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "dtype": "bfloat16",
}
OPTIONS = ("--preset", "none", "--scales", "none", "--activation-bits", "8")
CHUNK = 1 << 22


def main() -> None:
    """Measure and write the result."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--layers", type=int, default=32, help="decoder layers of the 8B-shaped model"
    )
    parser.add_argument(
        "--workers",
        type=int,
        nargs="+",
        default=[1],
        help="a conversion with each of these numbers of processes",
    )
    parser.add_argument(
        "--folder",
        type=Path,
        help="where to make the models; default: the system's temporary folder",
    )
    parser.add_argument("--out", type=Path, help="JSON file of the result; default: stdout")
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
    text = json.dumps(result, indent=1) + "\n"
    if arguments.out:
        arguments.out.write_text(text)
    else:
        print(text, end="")


def make_model(directory: Path, shape: dict[str, Any], random: bool) -> Path:
    """A checkpoint of one file for each decoder layer, and one for the rest: random, or sparse
    and zero."""
    directory.mkdir()
    config = COMMON | shape
    (directory / "config.json").write_text(json.dumps(config))
    files: dict[str, dict[str, tuple[int, ...]]] = {"rest": rest_tensors(config)}
    for index in range(shape["num_hidden_layers"]):
        files[f"layer-{index:05d}"] = layer_tensors(config, index)
    weight_map: dict[str, str] = {}
    for number, tensors in enumerate(files.values(), start=1):
        file = f"model-{number:05d}-of-{len(files):05d}.safetensors"
        write_file(directory / file, tensors, random)
        weight_map |= dict.fromkeys(tensors, file)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return directory


def rest_tensors(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Shapes of what is outside the decoder layers."""
    table = (config["vocab_size"], config["hidden_size"])
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": table,
        "model.norm.weight": table[1:],
    }
    return shapes if config["tie_word_embeddings"] else shapes | {"lm_head.weight": table}


def layer_tensors(config: dict[str, Any], index: int) -> dict[str, tuple[int, ...]]:
    """Shapes of one decoder layer."""
    hidden, wide = config["hidden_size"], config["intermediate_size"]
    values = hidden // config["num_attention_heads"] * config["num_key_value_heads"]
    linears = {
        "q_proj": (hidden, hidden),
        "k_proj": (values, hidden),
        "v_proj": (values, hidden),
        "o_proj": (hidden, hidden),
    }
    shapes: dict[str, tuple[int, ...]] = {
        f"self_attn.{name}.weight": shape for name, shape in linears.items()
    }
    shapes |= {"mlp.gate_proj.weight": (wide, hidden), "mlp.up_proj.weight": (wide, hidden)}
    shapes |= {"mlp.down_proj.weight": (hidden, wide)}
    shapes |= {"input_layernorm.weight": (hidden,), "post_attention_layernorm.weight": (hidden,)}
    return {f"model.layers.{index}.{name}": shape for name, shape in shapes.items()}


def write_file(path: Path, tensors: dict[str, tuple[int, ...]], random: bool) -> None:
    """A bfloat16 safetensors file written a few megabytes at a time, or one whose data is a
    hole."""
    header, end = {}, 0
    for name, shape in tensors.items():
        start, end = end, end + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    generator = torch.Generator().manual_seed(len(text) + end)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        if not random:
            file.truncate(8 + len(text) + end)
            return
        for shape in tensors.values():
            for start in range(0, math.prod(shape), CHUNK):
                values = (
                    torch.randn(min(CHUNK, math.prod(shape) - start), generator=generator)
                    / shape[-1] ** 0.5
                )
                file.write(values.bfloat16().view(torch.uint8).numpy().data)


def plan(source: Path) -> dict[str, Any]:
    """The plan's figures; its seconds are for this machine as it is now."""
    facts, used = command("plan", str(source), *OPTIONS)
    names = ("refusals", "layers", "source_bytes", "output_bytes", "memory_bytes", "seconds")
    return {name: facts[name] for name in names} | {"planning": used}


def convert(source: Path, out: Path, workers: int) -> dict[str, Any]:
    """Seconds, processor seconds and peak memory of a conversion, and the same for each billion of
    parameters.

    The memory is that of the largest process; the plan's time and memory are those of one process.
    """
    planned, _ = command("plan", str(source), *OPTIONS)
    facts, used = command("run", str(source), str(out), *OPTIONS, "--workers", str(workers))
    billions = sum(file.stat().st_size for file in source.glob("*.safetensors")) / 2e9
    shutil.rmtree(out)
    return {
        "workers": workers,
        "billion_parameters": round(billions, 3),
        **used,
        "wall_seconds_per_billion": round(used["wall_seconds"] / billions, 2),
        "cpu_seconds_per_billion": round(used["cpu_seconds"] / billions, 2),
        "planned_seconds": planned["seconds"],
        "planned_memory_bytes": planned["memory_bytes"],
        "output_bytes": facts["output_bytes"],
    }


def command(*words: str) -> tuple[dict[str, Any], dict[str, float]]:
    """What ``smoothrot-convert`` prints, and what it used."""
    started = time.monotonic()
    with tempfile.TemporaryFile() as output:
        child = subprocess.Popen(
            [sys.executable, "-m", "smoothrot_offline.cli", *words, "--json"], stdout=output
        )
        _, status, usage = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
        if child.returncode:
            raise SystemExit(
                f"smoothrot-convert {words[0]} ended with exit code {child.returncode}"
            )
        output.seek(0)
        facts = json.load(output)
    used = {
        "wall_seconds": time.monotonic() - started,
        "cpu_seconds": usage.ru_utime + usage.ru_stime,
    }
    return facts, {name: round(value, 1) for name, value in used.items()} | {
        "peak_rss_bytes": usage.ru_maxrss * 1024
    }


def read_config(source: Path) -> dict[str, Any]:
    """Sizes of the model that is converted."""
    config = json.loads((source / "config.json").read_text())
    return {name: config[name] for name in SHAPES["8b"]}


if __name__ == "__main__":
    main()
