# SPDX-License-Identifier: Apache-2.0
"""Checkpoints with packed weights, made from known codes by each format's definition or its own
library; and what their weights are worth."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from safetensors.torch import load_file, save_file
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

Tensors = dict[str, torch.Tensor]
Pack = Callable[[torch.Tensor], tuple[torch.Tensor, Tensors]]
"""Of a weight ``(out, in)``, which says the shape: what is stored is worth, and by the last parts
of their names the tensors that are stored."""


def pack_linears(source: Path, quantization: dict[str, Any], pack: Pack) -> Tensors:
    """Put packed weights in place of a checkpoint's linears; returns what they are worth."""
    worth: Tensors = {}

    def change(tensors: Tensors) -> None:
        for name in [name for name in tensors if name.endswith("_proj.weight")]:
            worth[name], stored = pack(tensors.pop(name))
            module = name.removesuffix("weight")
            tensors |= {module + part: tensor.contiguous() for part, tensor in stored.items()}

    _repack(source, quantization, change)
    return worth


def _repack(source: Path, quantization: dict[str, Any], change: Callable[[Tensors], None]) -> None:
    """Change the tensors of each file of a checkpoint, and what ``config.json`` says of them."""
    weight_map: dict[str, str] = {}
    for file in source.glob("*.safetensors"):
        tensors = load_file(file)
        change(tensors)
        save_file(tensors, file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file.name)
    index = source / "model.safetensors.index.json"
    if index.exists():
        index.write_text(json.dumps({"weight_map": weight_map}))
    config = source / "config.json"
    content = json.loads(config.read_text()) | {"quantization_config": quantization}
    config.write_text(json.dumps(content))


@dataclass(frozen=True)
class Codes:
    """Random codes ``(out, in)`` of a weight and what they mean, in groups of inputs: zero points
    and scales ``(out, groups)``, and the group of each input."""

    codes: torch.Tensor
    zeros: torch.Tensor
    scales: torch.Tensor
    groups: torch.Tensor

    @property
    def worth(self) -> torch.Tensor:
        """Float32 ``(out, in)``, from the definition."""
        zeros, scales = (part.index_select(1, self.groups) for part in (self.zeros, self.scales))
        return (self.codes - zeros).float() * scales.float()


def draw(
    weight: torch.Tensor,
    bits: int,
    group_size: int,
    symmetric: bool,
    ordered: bool = False,
    lowest_zero: int = 1,
    dtype: torch.dtype = torch.float16,
) -> Codes:
    """:class:`Codes` of the shape of a weight; ``ordered``: groups of inputs that are no
    neighbours."""
    out, inputs = weight.shape
    size = inputs if group_size == -1 else group_size
    groups = torch.arange(inputs) // size
    if ordered:
        groups = groups[torch.randperm(inputs)]
    count = int(groups.max()) + 1
    levels = 1 << bits
    zeros = torch.randint(lowest_zero, levels, (out, count))
    if symmetric:
        zeros = torch.full_like(zeros, levels // 2)
    scales = (torch.rand(out, count) + 0.5) / levels / inputs**0.5
    return Codes(torch.randint(0, levels, (out, inputs)), zeros, scales.to(dtype), groups)


def _words(codes: torch.Tensor, bits: int, places: list[int]) -> torch.Tensor:
    """int32 ``(n / len(places), m)`` of codes ``(n, m)``: code ``k`` of a word is shifted by
    ``bits * places[k]``."""
    rows = codes.numpy().astype(np.uint64)
    words = np.zeros((len(rows) // len(places), rows.shape[1]), np.uint64)
    for row, values in enumerate(rows):
        words[row // len(places)] |= values << np.uint64(bits * places[row % len(places)])
    return torch.from_numpy(words.astype(np.uint32).view(np.int32))


def gptq(bits: int = 4, version: int = 1, **options: Any) -> Pack:
    """GPTQ in the checkpoint format ``gptq`` (1) or ``gptq_v2`` (2)."""

    def pack(weight: torch.Tensor) -> tuple[torch.Tensor, Tensors]:
        drawn = draw(weight, bits, **options)
        places = list(range(32 // bits))
        stored_zeros = drawn.zeros - (1 if version == 1 else 0)
        return drawn.worth, {
            "qweight": _words(drawn.codes.T, bits, places),
            "qzeros": _words(stored_zeros, bits, places).T,
            "scales": drawn.scales.T,
            "g_idx": drawn.groups.int(),
        }

    return pack


def gptq_config(
    bits: int = 4, version: int = 1, group_size: int = -1, **changes: Any
) -> dict[str, Any]:
    """What AutoGPTQ writes into ``config.json``."""
    return {
        "quant_method": "gptq",
        "bits": bits,
        "group_size": group_size,
        "sym": True,
        "desc_act": False,
        "checkpoint_format": "gptq" if version == 1 else "gptq_v2",
        "damp_percent": 0.01,
        "lm_head": False,
    } | changes


def awq(group_size: int) -> Pack:
    """AWQ for AutoAWQ's GEMM kernel: a word's codes, from the lowest bits on, are those of its
    outputs 0, 2, 4, 6, 1, 3, 5, 7."""
    order = [0, 2, 4, 6, 1, 3, 5, 7]
    places = [order.index(output) for output in range(8)]

    def pack(weight: torch.Tensor) -> tuple[torch.Tensor, Tensors]:
        drawn = draw(weight, 4, group_size, symmetric=False, lowest_zero=0)
        return drawn.worth, {
            "qweight": _words(drawn.codes, 4, places).T,
            "qzeros": _words(drawn.zeros, 4, places).T,
            "scales": drawn.scales.T,
        }

    return pack


def awq_config(group_size: int, **changes: Any) -> dict[str, Any]:
    """What AutoAWQ writes into ``config.json``."""
    return {
        "quant_method": "awq",
        "bits": 4,
        "group_size": group_size,
        "zero_point": True,
        "version": "gemm",
        "modules_to_not_convert": None,
    } | changes


def _as_fp8(weight: torch.Tensor, block: tuple[int, int]) -> tuple[torch.Tensor, ...]:
    """The codes of a weight, the scale of each block, and what they are worth."""
    blocks = [torch.arange(n) // step for n, step in zip(weight.shape, block, strict=True)]
    place = (blocks[0][:, None], blocks[1][None, :])
    largest = torch.zeros(int(blocks[0][-1]) + 1, int(blocks[1][-1]) + 1)
    largest.index_put_(place, weight.float().abs(), accumulate=True)
    scales = largest / 448 / 8
    codes = (weight.float() / scales[place]).clamp(-448, 448).to(torch.float8_e4m3fn)
    return codes, scales, codes.float() * scales[place]


def fp8(scale_name: str = "weight_scale", scale_shape: tuple[int, ...] = (1,)) -> Pack:
    """FP8 with one scale for a weight."""

    def pack(weight: torch.Tensor) -> tuple[torch.Tensor, Tensors]:
        codes, scale, worth = _as_fp8(weight, (weight.shape[0], weight.shape[1]))
        return worth, {"weight": codes, scale_name: scale.reshape(scale_shape)}

    return pack


def fp8_config(**changes: Any) -> dict[str, Any]:
    """What AutoFP8 writes into ``config.json``."""
    return {
        "quant_method": "fp8",
        "activation_scheme": "dynamic",
        "ignored_layers": ["lm_head"],
    } | changes


def _float_arguments(strategy: str) -> QuantizationArgs:
    block = [32, 48] if strategy == "block" else None
    return QuantizationArgs(num_bits=8, type="float", strategy=strategy, block_structure=block)


def compressed_fp8(strategy: str) -> Pack:
    """FP8 stored by the compressed-tensors library."""
    scheme = QuantizationScheme(targets=["Linear"], weights=_float_arguments(strategy))
    library = BaseCompressor.get_value_from_registry("float-quantized")

    def pack(weight: torch.Tensor) -> tuple[torch.Tensor, Tensors]:
        rows, columns = weight.shape
        block = {"tensor": (rows, columns), "channel": (1, columns), "block": (32, 48)}[strategy]
        _, scale, worth = _as_fp8(weight, block)
        if strategy == "tensor":
            scale = scale.reshape(1)
        return worth, library.compress({"weight": worth, "weight_scale": scale}, scheme)

    return pack


def compressed_fp8_config(strategy: str, **changes: Any) -> dict[str, Any]:
    """What llm-compressor writes into ``config.json`` for its FP8 schemes."""
    group = {
        "targets": ["Linear"],
        "weights": _float_arguments(strategy).model_dump(mode="json"),
        "input_activations": {"num_bits": 8, "type": "float", "strategy": "token", "dynamic": True},
        "output_activations": None,
    }
    return {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": group | changes},
        "ignore": ["lm_head"],
        "kv_cache_scheme": None,
    }


def _arguments(
    bits: int, group_size: int, symmetric: bool, ordered: bool = False
) -> QuantizationArgs:
    return QuantizationArgs(
        num_bits=bits,
        type="int",
        symmetric=symmetric,
        strategy="channel" if group_size == -1 else "group",
        group_size=None if group_size == -1 else group_size,
        actorder="group" if ordered else None,
    )


def compressed(bits: int, group_size: int, symmetric: bool, ordered: bool = False) -> Pack:
    """Integers packed by the compressed-tensors library."""
    scheme = QuantizationScheme(
        targets=["Linear"], weights=_arguments(bits, group_size, symmetric, ordered)
    )
    library = BaseCompressor.get_value_from_registry("pack-quantized")

    def pack(weight: torch.Tensor) -> tuple[torch.Tensor, Tensors]:
        drawn = draw(weight, bits, group_size, symmetric, ordered, 0, torch.bfloat16)
        middle = 1 << (bits - 1)
        given = {"weight": drawn.worth, "weight_scale": drawn.scales.float()}
        if not symmetric:
            given["weight_zero_point"] = (drawn.zeros - middle).to(torch.int8)
        if ordered:
            given["weight_g_idx"] = drawn.groups.int()
        stored = library.compress(given, scheme)
        assert torch.equal(library.decompress(stored, scheme)["weight"], drawn.worth)
        return drawn.worth, stored | {"weight_scale": drawn.scales}

    return pack


def compressed_config(
    bits: int, group_size: int, symmetric: bool, ordered: bool = False, **changes: Any
) -> dict[str, Any]:
    """What llm-compressor writes into ``config.json``."""
    weights = _arguments(bits, group_size, symmetric, ordered).model_dump(mode="json")
    group = {
        "targets": ["Linear"],
        "weights": weights,
        "input_activations": None,
        "output_activations": None,
        "format": "pack-quantized",
    }
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
        "kv_cache_scheme": None,
        "sparsity_config": {},
        "transform_config": {},
    } | changes


MXFP4_CONFIG = {
    "quant_method": "mxfp4",
    "modules_to_not_convert": ["model.layers.*.self_attn", "model.layers.*.mlp.router", "lm_head"],
}
"""What gpt-oss says in ``config.json``."""


def pack_mxfp4(source: Path) -> Tensors:
    """Put MXFP4 in place of the fused experts of a gpt-oss; returns what transformers makes of
    it."""
    worth: Tensors = {}

    def change(tensors: Tensors) -> None:
        for name in [name for name in tensors if name.endswith(("gate_up_proj", "down_proj"))]:
            experts, inputs, out = tensors.pop(name).shape
            blocks = torch.randint(0, 256, (experts, out, inputs // 32, 16), dtype=torch.uint8)
            scales = torch.randint(120, 126, blocks.shape[:-1], dtype=torch.uint8)
            tensors |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
            worth[name] = convert_moe_packed_tensors(blocks, scales)

    _repack(source, MXFP4_CONFIG, change)
    return worth
