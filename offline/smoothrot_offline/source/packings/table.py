# SPDX-License-Identifier: Apache-2.0
"""Which packing a source has, by the ``quant_method`` of its configuration."""

from collections.abc import Callable, Mapping
from typing import Any

from smoothrot_offline.source.packings.awq import parse_awq
from smoothrot_offline.source.packings.compressed import parse_compressed
from smoothrot_offline.source.packings.fp8 import parse_fp8
from smoothrot_offline.source.packings.gptq import parse_gptq
from smoothrot_offline.source.packings.mxfp4 import parse_mxfp4
from smoothrot_offline.source.packings.packed import Packing

PACKINGS: Mapping[str, Callable[[Mapping[str, Any]], Packing]] = {
    "fp8": parse_fp8,
    "gptq": parse_gptq,
    "awq": parse_awq,
    "compressed-tensors": parse_compressed,
    "mxfp4": parse_mxfp4,
}


def find_packing(config: Mapping[str, Any]) -> Packing | None:
    """The packing that a ``config.json`` names; None if it names none of :data:`PACKINGS`.

    Raises:
        UnsupportedModelError: it is one of them, of a kind that is not read.
    """
    quantization = config.get("quantization_config")
    if not isinstance(quantization, dict):
        return None
    method = quantization.get("quant_method")
    parse = PACKINGS.get(method) if isinstance(method, str) else None
    return None if parse is None else parse(quantization)
