# SPDX-License-Identifier: Apache-2.0
"""Summarise a converted directory from its configuration, its headers and its manifest."""

from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from smoothrot_offline.manifest import read_manifest
from smoothrot_offline.sizes import Sizes, header_table, measure
from smoothrot_offline.verify import model_dtype, open_converted
from smoothrot_vllm.format import QuantizationSchema


class Inspection(BaseModel):
    """A converted model: what it is, how it is stored, its size beside the same model in 16 bits,
    and how it was made.

    ``origin`` is the manifest without the digests of the output.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    architecture: str
    layers: int
    dtype: str
    quantization: QuantizationSchema
    output_bytes: Sizes
    sixteen_bit_bytes: Sizes
    ratio_total: float
    ratio_linears: float
    origin: dict[str, Any]


def inspect(directory: Path) -> Inspection:
    """Read headers and manifest; no weight is read.

    ``sixteen_bit_bytes`` are those of the source: its embedding is counted once if it was shared
    with the head.

    Raises:
        SmoothRotError: the directory is no converted checkpoint, or is damaged.
    """
    checkpoint, spec, schema = open_converted(directory)
    manifest = read_manifest(directory)
    dtype = model_dtype(checkpoint.config)
    after = measure(spec, header_table(checkpoint, checkpoint.tensors))
    shapes = spec.source_tensors()
    if manifest.source.tied:
        shapes.pop(f"{spec.architecture.lm_head}.weight", None)
    before = measure(spec, {name: (shape, dtype) for name, shape in shapes.items()})
    return Inspection(
        architecture=spec.architecture.class_name,
        layers=spec.layers,
        dtype=str(dtype).removeprefix("torch."),
        quantization=schema,
        output_bytes=after,
        sixteen_bit_bytes=before,
        ratio_total=before.total / after.total,
        ratio_linears=before.linears / after.linears,
        origin=manifest.model_dump(mode="json", exclude={"tensors", "files"}),
    )
