# SPDX-License-Identifier: Apache-2.0
"""Every fold of a conversion in its order, for one model: norms, R1, R2, S, R4."""

from dataclasses import dataclass
from typing import Self

import torch

from smoothrot_offline.architectures import ModelSpec
from smoothrot_offline.config import ConvertConfig, online_block
from smoothrot_offline.rotate import (
    Rotation,
    Tensors,
    fold_norms,
    random_rotation,
    random_signs,
    rotate_down_input,
    rotate_heads,
    rotate_residual,
)
from smoothrot_offline.smooth import fold_smoothing


@dataclass(frozen=True)
class ModelTransform:
    """What is folded into one model's weights. ``residual`` (R1) is None when nothing is rotated.

    The transformed model computes the original's logits, if the server rotates down_proj's input by
    ``I (x) H_block`` with ``online_block`` (0: no rotation).
    """

    spec: ModelSpec
    seed: int
    residual: Rotation | None
    online_block: int

    @classmethod
    def of(cls, spec: ModelSpec, config: ConvertConfig) -> Self:
        """The transform that a configuration asks for.

        Raises:
            UnsupportedModelError: a size has no Hadamard block.
        """
        if not config.rotate:
            return cls(spec, config.seed, None, 0)
        return cls(spec, config.seed, random_rotation(spec.hidden, config.seed), online_block(spec, config).size)

    def layer(self, index: int, tensors: Tensors, scales: torch.Tensor | None) -> None:
        """Transform the float64 tensors of decoder layer ``index``, in place; ``scales`` are S, or None."""
        table = self.spec.architecture
        if scales is not None:
            fold_smoothing(tensors, table, scales)
        if self.residual is not None:
            fold_norms(tensors, table)
            rotate_residual(tensors, table, self.residual)
            rotate_heads(tensors, table, self.spec.head_dim)
            signs = random_signs(self.spec.intermediate, self.seed, f"R4/{index}")
            rotate_down_input(tensors, table, Rotation(signs, self.online_block))

    def embedding(self, rows: torch.Tensor) -> torch.Tensor:
        """Embedding rows, float64 ``(rows, hidden)``, in the rotated residual stream."""
        return rows if self.residual is None else self.residual.rotate(rows)

    def head(self, rows: torch.Tensor, gamma: torch.Tensor) -> torch.Tensor:
        """Head rows, float64 ``(rows, hidden)``, with the final norm's weight ``gamma (hidden,)`` folded in, then R1."""
        return rows if self.residual is None else self.residual.rotate(rows * gamma)

    def final_norm(self, gamma: torch.Tensor) -> torch.Tensor:
        """What is left of the final norm's weight."""
        return gamma if self.residual is None else torch.ones_like(gamma)
