# SPDX-License-Identifier: Apache-2.0
"""Integer and FP8 weights as the compressed-tensors library stores them."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

from smoothrot_offline.source.packings.fp8 import Fp8, block_shape
from smoothrot_offline.source.packings.packed import (
    FLOATS,
    INT32,
    WORD_BITS,
    Layout,
    Packing,
    Shape,
    check_bits,
    check_group_size,
    check_groups,
    count_groups,
    scaled,
    unpack_words,
    unsupported,
)
from smoothrot_vllm.errors import CheckpointError

if TYPE_CHECKING:
    import torch

_ORDERED = (True, "group", "dynamic")
_NEIGHBOURS = (None, False, "weight", "static")
"""Of ``actorder``: groups of any inputs, groups of neighbouring ones."""
_INTEGERS: dict[str, tuple[Any, ...]] = {
    "type": ("int",),
    "dynamic": (False, None),
    "symmetric": (True, False, None),
    "actorder": (*_NEIGHBOURS, *_ORDERED),
    "strategy": ("group", "channel"),
}
_FLOATS: dict[str, tuple[Any, ...]] = {
    "type": ("float",),
    "dynamic": (False, None),
    "symmetric": (True, None),
    "actorder": _NEIGHBOURS,
    "strategy": ("tensor", "channel", "block"),
}
_FORMATS = {"pack-quantized": _INTEGERS, "float-quantized": _FLOATS}
"""What the scheme of weights may say, by format."""
_WEIGHTS = (*_INTEGERS, "num_bits", "group_size", "block_structure")
"""What says what a packed weight is worth."""
_OF_WEIGHTS = "config_groups: weights"
_ABSENT = ("kv_cache_scheme", "transform_config", "sparsity_config")
"""Beside weights in few bits."""


class PackedIntegers(Packing):
    """``weight_packed (out, in / n)``, words of n codes of neighbouring inputs;
    ``weight_scale (out, groups)``; ``weight_zero_point (ceil(out / n), groups)``, words of
    neighbouring outputs, unless the codes are symmetric; ``weight_g_idx (in,)``, the group of each
    input, where groups are no neighbours; ``weight_shape``."""

    roles = ("weight_packed", "weight_scale", "weight_zero_point", "weight_g_idx", "weight_shape")

    def __init__(self, bits: int, group_size: int, symmetric: bool, ordered: bool) -> None:
        self.title = f"{bits}-bit compressed-tensors"
        self.bits = bits
        self.group_size = group_size
        self.symmetric = symmetric
        self.ordered = ordered

    def layout(self, there: Mapping[str, Shape]) -> Layout:
        """See :class:`Packing`."""
        stored = there[self.roles[0]]
        codes = WORD_BITS // self.bits
        out, inputs = stored[0], stored[1] * codes
        groups = count_groups(inputs, self.group_size)
        parts: dict[str, tuple[Collection[str], Shape]] = {
            "weight_packed": (INT32, stored),
            "weight_scale": (FLOATS, (out, groups)),
            "weight_shape": (("I64", *INT32), (2,)),
        }
        if not self.symmetric:
            parts["weight_zero_point"] = (INT32, (-(-out // codes), groups))
        if self.ordered or "weight_g_idx" in there:
            parts["weight_g_idx"] = (INT32, (inputs,))
        return Layout((out, inputs), parts)

    def unpack(self, name: str, parts: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """See :class:`Packing`."""
        codes = unpack_words(parts["weight_packed"], self.bits, dim=1)
        if (shape := parts["weight_shape"].tolist()) != list(codes.shape):
            raise CheckpointError(
                f"tensor {name}_shape: expected {list(codes.shape)}, whole words of codes, got"
                f" {shape}. Convert the 16-bit original."
            )
        scales, groups = parts["weight_scale"], parts.get("weight_g_idx")
        if self.symmetric:
            zeros: torch.Tensor | int = 1 << (self.bits - 1)
        else:
            zeros = unpack_words(parts["weight_zero_point"], self.bits, dim=0)[: len(scales)]
        if groups is not None:
            groups = check_groups(f"{name}_g_idx", groups, scales.shape[1])
            # Its readers sort the inputs by group and cut them into groups of one size.
            sizes, size = groups.bincount(), codes.shape[1] // scales.shape[1]
            if (wrong := sizes[sizes != size]).numel():
                raise CheckpointError(
                    f"tensor {name}_g_idx: expected {size} inputs in each of {scales.shape[1]}"
                    f" groups, got {int(wrong[0])}. Fetch the checkpoint again."
                )
        return scaled(codes, zeros, scales, self.group_size, groups)


def parse_compressed(quantization: Mapping[str, Any]) -> Packing:
    """The packing of a ``quantization_config`` with quant_method ``compressed-tensors``.

    Raises:
        UnsupportedModelError: it says something that is not read.
    """
    layout = quantization.get("format")
    if not isinstance(layout, str) or layout not in _FORMATS:
        raise unsupported("format", " or ".join(_FORMATS), layout)
    for key in _ABSENT:
        found = quantization.get(key)
        if found and not (isinstance(found, dict) and found.get("format") == "dense"):
            raise unsupported(key, "none", found)
    weights, dynamic = _scheme(quantization)
    for key, known in _FORMATS[layout].items():
        if (found := weights[key]) not in known:
            raise unsupported(f"{_OF_WEIGHTS}.{key}", f"one of {known}", found)
    key, strategy = f"{_OF_WEIGHTS}.num_bits", weights["strategy"]
    if layout == "float-quantized":
        check_bits(key, weights["num_bits"], (8,))
        if strategy == "block":
            key = f"{_OF_WEIGHTS}.block_structure"
            return Fp8(block_shape(key, weights["block_structure"]), dynamic)
        return Fp8(strategy, dynamic)
    if dynamic:
        raise unsupported("config_groups: input_activations", f"none in {layout}", "dynamic ones")
    size = weights["group_size"] if strategy == "group" else -1
    return PackedIntegers(
        check_bits(key, weights["num_bits"]),
        check_group_size(f"{_OF_WEIGHTS}.group_size", size),
        weights["symmetric"] is not False,
        weights["actorder"] in _ORDERED,
    )


def _scheme(quantization: Mapping[str, Any]) -> tuple[dict[str, Any], bool]:
    """What the weights of all modules are stored by, and whether activations are quantized as they
    come."""
    groups = quantization.get("config_groups")
    if not isinstance(groups, dict) or not groups:
        raise unsupported("config_groups", "at least one group", groups)
    schemes: list[dict[str, Any]] = []
    dynamic = False
    for name, group in groups.items():
        weights = group.get("weights") if isinstance(group, dict) else None
        if not isinstance(weights, dict):
            raise unsupported(f"config_groups.{name}", "a scheme of weights", group)
        if found := group.get("output_activations"):
            raise unsupported(f"config_groups.{name}.output_activations", "none", found)
        if found := group.get("input_activations"):
            if not isinstance(found, dict) or found.get("dynamic") is not True:
                key = f"config_groups.{name}.input_activations"
                raise unsupported(key, "none, or dynamic ones without stored scales", found)
            dynamic = True
        schemes.append({key: weights.get(key) for key in _WEIGHTS})
        if schemes[-1] != schemes[0]:
            raise unsupported("config_groups", "one scheme in all groups", schemes)
    return schemes[0], dynamic
