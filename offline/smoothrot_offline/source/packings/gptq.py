# SPDX-License-Identifier: Apache-2.0
"""GPTQ as AutoGPTQ and GPTQModel store it."""

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

_FORMATS = {"gptq": 1, "gptq_v2": 0}
"""What is to be added to a stored zero point, by the format of the checkpoint."""


class Gptq(Packing):
    """``qweight (in / n, out)`` and ``qzeros (groups, out / n)``, words of n codes, the former's of
    neighbouring inputs, the latter's of outputs; ``scales (groups, out)``; ``g_idx (in,)``, the
    group of each input."""

    roles = ("qweight", "qzeros", "scales", "g_idx")

    def __init__(
        self, bits: int, group_size: int, symmetric: bool, ordered: bool, offset: int
    ) -> None:
        self.title = f"{bits}-bit GPTQ"
        self.bits = bits
        self.group_size = group_size
        self.symmetric = symmetric
        self.ordered = ordered
        self.offset = offset

    def layout(self, there: Mapping[str, Shape]) -> Layout:
        """See :class:`Packing`."""
        stored = there[self.roles[0]]
        codes = WORD_BITS // self.bits
        inputs, out = stored[0] * codes, stored[1]
        groups = count_groups(inputs, self.group_size)
        parts: dict[str, tuple[Collection[str], Shape]] = {
            "qweight": (INT32, stored),
            "qzeros": (INT32, (groups, -(-out // codes))),
            "scales": (FLOATS, (groups, out)),
        }
        if self.ordered or "g_idx" in there:
            parts["g_idx"] = (INT32, (inputs,))
        return Layout((out, inputs), parts)

    def unpack(self, name: str, parts: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """See :class:`Packing`."""
        module, scales = name.removesuffix("weight"), parts["scales"]
        zeros = unpack_words(parts["qzeros"], self.bits, dim=1)[:, : scales.shape[1]]
        highest = (1 << self.bits) - 1
        if self.offset and (count := int((zeros == highest).sum())):
            raise CheckpointError(
                f"tensor {module}qzeros: expected zero points below {highest}, to each of which"
                f" checkpoint_format gptq adds 1, got {count} of {highest}, which some readers take"
                f" for {highest + 1} and others for 0. Convert the 16-bit original, or save the"
                " model in the format gptq_v2."
            )
        zeros = zeros + self.offset
        middle = 1 << (self.bits - 1)
        if self.symmetric and (wrong := zeros[zeros != middle]).numel():
            raise CheckpointError(
                f"tensor {module}qzeros: expected zero points of {middle - self.offset}, as"
                " quantization_config says sym and the checkpoint_format that it names, got"
                f" {int(wrong[0]) - self.offset}. Correct sym or checkpoint_format in config.json."
            )
        groups = parts.get("g_idx")
        return scaled(
            unpack_words(parts["qweight"], self.bits, dim=0).T,
            zeros.T,
            scales.T,
            self.group_size,
            None if groups is None else check_groups(f"{module}g_idx", groups, len(scales)),
        )


def parse_gptq(quantization: Mapping[str, Any]) -> Packing:
    """The packing of a ``quantization_config`` with quant_method ``gptq``.

    Raises:
        UnsupportedModelError: it says something that is not read.
    """
    bits = check_bits("bits", quantization.get("bits"))
    size = check_group_size("group_size", quantization.get("group_size"))
    key = next((key for key in ("checkpoint_format", "format") if quantization.get(key)), "format")
    layout = quantization.get(key, "gptq")
    if not isinstance(layout, str) or layout not in _FORMATS:
        raise unsupported(key, " or ".join(_FORMATS), layout)
    if quantization.get("is_marlin_format"):
        raise unsupported("is_marlin_format", "false", quantization["is_marlin_format"])
    # Rules that leave modules out are seen by the tensors; others change bits or groups.
    dynamic = quantization.get("dynamic") or {}
    if not isinstance(dynamic, dict) or not all(rule.startswith("-:") for rule in dynamic):
        raise unsupported("dynamic", "the same bits and groups in all modules", dynamic)
    flags = {"sym": True, "desc_act": False}
    for key, default in flags.items():
        flags[key] = quantization.get(key, default)
        if not isinstance(flags[key], bool):
            raise unsupported(key, "true or false", flags[key])
    return Gptq(bits, size, flags["sym"], flags["desc_act"], _FORMATS[layout])
