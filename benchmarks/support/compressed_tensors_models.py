# SPDX-License-Identifier: Apache-2.0
"""A model as vLLM's own quantized paths take it: compressed-tensors W8A8 and W4A16, each weight
rounded to nearest."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
from safetensors.torch import load_file, save_file

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")


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
                quantized(name, tensor, scheme, group)
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


def quantized(name: str, weight: torch.Tensor, scheme: str, group: int) -> dict[str, torch.Tensor]:
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
    weights: dict[str, Any] = integer | {"num_bits": 8, "strategy": "channel"}
    activations: dict[str, Any] | None
    activations = integer | {"num_bits": 8, "strategy": "token", "dynamic": True}
    if scheme == "w4a16":
        weights = integer | {"num_bits": 4, "strategy": "group", "group_size": group}
        activations = None
    linears = {"targets": ["Linear"], "weights": weights | {"dynamic": False}}
    return {
        "quant_method": "compressed-tensors",
        "format": "int-quantized" if scheme == "w8a8" else "pack-quantized",
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {"group_0": linears | {"input_activations": activations}},
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
