# SPDX-License-Identifier: Apache-2.0
"""Sources with block-scaled FP8 weights, as DeepSeek and Qwen publish them: ``W = float(weight) *
weight_scale_inv`` per block.

``config.json["quantization_config"]`` of such a model has ``quant_method`` fp8 and
``weight_block_size``; beside each FP8 tensor ``P.weight`` the files hold ``P.weight_scale_inv``,
one scale for each block.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from smoothrot_vllm.errors import CheckpointError, UnsupportedModelError

if TYPE_CHECKING:  # a refusal by configuration must not wait for it
    import torch

FP8 = "F8_E4M3"
SCALE_SUFFIX = "_scale_inv"
_SCALE_DTYPES = ("F32", "BF16")


def is_fp8(config: Mapping[str, Any]) -> bool:
    """Whether a source's ``config.json`` says that its weights are FP8."""
    quantization = config.get("quantization_config")
    return isinstance(quantization, dict) and quantization.get("quant_method") == "fp8"


def block_shape(config: Mapping[str, Any]) -> tuple[int, int]:
    """Rows and columns that share a scale.

    Raises:
        UnsupportedModelError: the scales are not per block.
    """
    found = config["quantization_config"].get("weight_block_size")
    if not (
        isinstance(found, list) and len(found) == 2 and all(type(n) is int and n > 0 for n in found)
    ):
        raise UnsupportedModelError(
            "config.json: quantization_config.weight_block_size: expected two positive numbers,"
            f" got {found!r}. Only FP8 with a scale for each block is read: convert the 16-bit"
            " original."
        )
    return found[0], found[1]


def check_scale(
    name: str,
    shape: tuple[int, ...],
    scale: tuple[str, tuple[int, ...]] | None,
    block: tuple[int, int],
) -> None:
    """Check that the FP8 tensor ``name`` of this shape has a scale, given as its dtype and shape,
    for each block.

    Raises:
        CheckpointError: it has none, or one of another dtype or shape.
    """
    wanted = tuple(-(-size // step) for size, step in zip(shape, block, strict=False))
    if scale is None or len(shape) != 2 or scale[1] != wanted or scale[0] not in _SCALE_DTYPES:
        raise CheckpointError(
            f"tensor {name}{SCALE_SUFFIX}: expected {' or '.join(_SCALE_DTYPES)} {wanted}, a scale"
            f" for each block of {block} of an FP8 weight {shape}, got"
            f" {'none' if scale is None else ' '.join(map(str, scale))}. Fetch the checkpoint"
            " again."
        )


def dequantize(weight: torch.Tensor, scale: torch.Tensor, block: tuple[int, int]) -> torch.Tensor:
    """Float32 ``(out, in)`` of an FP8 weight of that shape and its scales ``(ceil(out / rows),
    ceil(in / columns))``."""
    rows, columns = weight.shape
    spread = (
        scale.float()
        .repeat_interleave(block[0], 0)[:rows]
        .repeat_interleave(block[1], 1)[:, :columns]
    )
    return weight.float() * spread
