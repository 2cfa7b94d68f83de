# SPDX-License-Identifier: Apache-2.0
"""Every fold of a conversion in its order: norms, R1, R2, S, R4."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Self

import torch

from smoothrot_offline.config import ConvertConfig, online_rotations
from smoothrot_offline.source.family import Architecture, ModelSpec
from smoothrot_offline.transform.rotation import (
    Orthogonal,
    Rotation,
    Tensors,
    fold_norms,
    random_rotation,
    random_signs,
    rotate_down_input,
    rotate_heads,
    rotate_reader_inputs,
    rotate_residual,
    scale_up,
)
from smoothrot_vllm.errors import CheckpointError
from smoothrot_vllm.format import Online


@dataclass(frozen=True)
class LayerScales:
    """Smoothing scales of one decoder layer, float64, positive.

    ``down`` divides down_proj's input, ``(intermediate,)`` or, with experts, ``(experts,
    intermediate)``; or None. ``norms`` divide what each norm named gives out, ``(hidden,)``.
    """

    down: torch.Tensor | None = None
    norms: Mapping[str, torch.Tensor] = field(default_factory=dict)


def fold_smoothing(
    layer: dict[str, torch.Tensor], table: Architecture, scales: torch.Tensor
) -> None:
    """Divide down_proj's input by ``scales`` in up_proj's rows and bias, and multiply it back in
    down_proj's columns.

    Args:
        layer: tensors by names relative to the layer, float64; changed.
        table: the family, with its experts written out.
        scales: float64 ``(f,)``, or ``(experts, f)``.

    Raises:
        CheckpointError: a scale is zero, negative or not finite.
    """
    _check(scales, table.down)
    for (up, down), own in zip(table.products, scales.view(len(table.products), -1), strict=True):
        scale_up(layer, up, 1 / own)
        layer[f"{down}.weight"] = layer[f"{down}.weight"] * own


def fold_norm_smoothing(
    layer: dict[str, torch.Tensor], table: Architecture, scales: Mapping[str, torch.Tensor]
) -> None:
    """Divide what each norm gives out by its ``scales`` in its weight, and multiply it back in the
    columns of its readers.

    Raises:
        CheckpointError: a scale is zero, negative or not finite.
    """
    for norm, divisor in scales.items():
        _check(divisor, norm)
        layer[f"{norm}.weight"] = (
            layer[f"{norm}.weight"] + table.norm_offset
        ) / divisor - table.norm_offset
        for reader in table.readers[norm]:
            layer[f"{reader}.weight"] = layer[f"{reader}.weight"] * divisor


def _check(scales: torch.Tensor, where: str) -> None:
    if not (scales.isfinite() & (scales > 0)).all():
        raise CheckpointError(
            f"smoothing scales of {where}: expected positive finite numbers. Check the calibration"
            " text."
        )


@dataclass(frozen=True)
class ModelTransform:
    """What is folded into one model's weights. ``residual`` (R1) is None when the residual stream
    is not rotated; ``heads`` (R2) are the matrices of each layer, float64 ``(kv_heads, head_dim,
    head_dim)``, or None for Hadamard transforms.

    The transformed model computes the original's logits, if the server applies the ``online``
    rotations.
    """

    spec: ModelSpec
    seed: int
    residual: Orthogonal | None
    online: Online
    heads: Sequence[torch.Tensor] | None = None

    @classmethod
    def of(cls, spec: ModelSpec, config: ConvertConfig) -> Self:
        """The transform that a configuration asks for.

        Raises:
            UnsupportedModelError: a size has no Hadamard block.
        """
        folds_r1 = config.rotate and spec.architecture.rotates_residual
        residual = random_rotation(spec.hidden, config.seed) if folds_r1 else None
        return cls(spec, config.seed, residual, online_rotations(spec, config))

    def layer(self, index: int, tensors: Tensors, scales: LayerScales) -> None:
        """Transform the float64 tensors of decoder layer ``index``, in place; ``scales`` are S."""
        table = self.spec.architecture
        if scales.down is not None:
            fold_smoothing(tensors, table, scales.down)
        if self.residual is not None:
            fold_norms(tensors, table)
            rotate_residual(tensors, table, self.residual)
        fold_norm_smoothing(tensors, table, scales.norms)
        if self.online.readers is not None:
            rotate_reader_inputs(tensors, table, self.online.readers.block)
        if self.online.down_proj is not None:
            rotate_heads(tensors, self.spec, None if self.heads is None else self.heads[index])
            signs = random_signs(self.spec.intermediate, self.seed, f"R4/{index}").to(
                next(iter(tensors.values())).device
            )
            rotate_down_input(tensors, table, Rotation(signs, self.online.down_proj.block))

    def embedding(self, rows: torch.Tensor) -> torch.Tensor:
        """Embedding rows, float64 ``(rows, hidden)``, in the rotated residual stream."""
        return rows if self.residual is None else self.residual.rotate(rows)

    def head(self, rows: torch.Tensor, gamma: torch.Tensor) -> torch.Tensor:
        """Head rows, float64 ``(rows, hidden)``, with the final norm's stored weight ``gamma
        (hidden,)`` folded in, then R1."""
        offset = self.spec.architecture.norm_offset
        return rows if self.residual is None else self.residual.rotate(rows * (gamma + offset))

    def final_norm(self, gamma: torch.Tensor) -> torch.Tensor:
        """What is left of the final norm's stored weight."""
        return (
            gamma
            if self.residual is None
            else torch.full_like(gamma, 1 - self.spec.architecture.norm_offset)
        )
