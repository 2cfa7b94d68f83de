# SPDX-License-Identifier: Apache-2.0
"""Bytes of a checkpoint by what they are for, before and after."""

import math
from collections.abc import Iterable, Mapping

import torch
from pydantic import BaseModel, ConfigDict

from smoothrot_offline.architectures import ModelSpec
from smoothrot_offline.checkpoint import DTYPES, Checkpoint
from smoothrot_offline.config import ConvertConfig, make_schema, stays_tied
from smoothrot_vllm.errors import CheckpointError

TensorTable = Mapping[str, tuple[tuple[int, ...], torch.dtype]]
"""Shape and dtype by tensor name."""


class Sizes(BaseModel):
    """Bytes: decoder linears with their scales, embedding, head (0 if tied), and norms and
    biases."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    linears: int
    embedding: int
    lm_head: int
    other: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.linears + self.embedding + self.lm_head + self.other


def measure(spec: ModelSpec, tensors: TensorTable) -> Sizes:
    """Sizes of the tensors of a checkpoint of this model, source or output."""
    table = spec.architecture
    bytes_of = dict.fromkeys(Sizes.model_fields, 0)
    for name, (shape, dtype) in tensors.items():
        module, _, suffix = name.rpartition(".")
        if module == table.embedding:
            kind = "embedding"
        elif module == table.lm_head:
            kind = "lm_head"
        elif (
            suffix != "bias"
            and module.startswith(table.layers)
            and module.split(".", 3)[-1] in table.linears
        ):
            kind = "linears"
        else:
            kind = "other"
        bytes_of[kind] += math.prod(shape) * dtype.itemsize
    return Sizes(**bytes_of)


def header_table(checkpoint: Checkpoint, names: Iterable[str]) -> TensorTable:
    """Shapes and dtypes of tensors as a checkpoint's headers give them."""
    table = {}
    for name in names:
        info = checkpoint.info(name)
        if info.dtype not in DTYPES:
            raise CheckpointError(
                f"{checkpoint.path / info.file}: tensor {name}: expected dtype {', '.join(DTYPES)},"
                f" got {info.dtype}. Fetch or convert the model again."
            )
        table[name] = (info.shape, DTYPES[info.dtype])
    return table


def output_sizes(spec: ModelSpec, config: ConvertConfig, dtype: torch.dtype) -> Sizes:
    """Sizes of what a conversion writes.

    Raises:
        ConfigError, UnsupportedModelError: the options do not fit the model.
    """
    return measure(
        spec, spec.output_tensors(make_schema(spec, config), stays_tied(spec, config), dtype)
    )
