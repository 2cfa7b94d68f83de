# SPDX-License-Identifier: Apache-2.0
"""Integer weights as the compressed-tensors library packs them."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

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

_KNOWN = {
    "type": ("int",),
    "dynamic": (False, None),
    "symmetric": (True, False, None),
    "actorder": (None, False, "weight", "static", True, "group", "dynamic"),
    "strategy": ("group", "channel"),
}
_WEIGHTS = (*_KNOWN, "num_bits", "group_size")
"""What says what a packed weight is worth."""
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

    def layout(self, stored: Shape, roles: Collection[str]) -> Layout:
        """See :class:`Packing`."""
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
        if self.ordered or "weight_g_idx" in roles:
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
    if (found := quantization.get("format")) != "pack-quantized":
        raise unsupported("format", "pack-quantized", found)
    for key in _ABSENT:
        found = quantization.get(key)
        if found and not (isinstance(found, dict) and found.get("format") == "dense"):
            raise unsupported(key, "none", found)
    weights = _scheme(quantization)
    for key, known in _KNOWN.items():
        if (found := weights[key]) not in known:
            raise unsupported(f"config_groups: weights.{key}", f"one of {known}", found)
    bits = check_bits("config_groups: weights.num_bits", weights["num_bits"])
    grouped, size = weights["strategy"] == "group", weights["group_size"]
    return PackedIntegers(
        bits,
        check_group_size("config_groups: weights.group_size", size) if grouped else -1,
        weights["symmetric"] is not False,
        weights["actorder"] in (True, "group", "dynamic"),
    )


def _scheme(quantization: Mapping[str, Any]) -> dict[str, Any]:
    """What the weights of all modules are stored by."""
    groups = quantization.get("config_groups")
    if not isinstance(groups, dict) or not groups:
        raise unsupported("config_groups", "at least one group", groups)
    schemes: list[dict[str, Any]] = []
    for name, group in groups.items():
        weights = group.get("weights") if isinstance(group, dict) else None
        if not isinstance(weights, dict):
            raise unsupported(f"config_groups.{name}", "a scheme of weights", group)
        for key in ("input_activations", "output_activations"):
            if found := group.get(key):
                raise unsupported(f"config_groups.{name}.{key}", "none, only weights", found)
        schemes.append({key: weights.get(key) for key in _WEIGHTS})
        if schemes[-1] != schemes[0]:
            raise unsupported("config_groups", "one scheme in all groups", schemes)
    return schemes[0]
