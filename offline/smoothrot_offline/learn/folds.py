# SPDX-License-Identifier: Apache-2.0
"""R1, R2 and S as numbers that a gradient can move: where they start, how far they have gone."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from smoothrot_offline.transform.rotation import DenseRotation, head_matrices
from smoothrot_offline.transform.sides import LayerScales, ModelTransform

ANGLE = 0.03
"""Learning rate of a rotation of order n, in units of ``n^-1/2``: the first steps turn by at most
about twice this many radians, whatever n."""
SCALE_RATE = 0.01
"""Of the logarithm of a smoothing scale."""

Values = dict[str, torch.Tensor]
"""Orthogonal matrices and factors of scales, by name."""


@dataclass(frozen=True)
class Folded:
    """What is folded: the transform with dense rotations, and S of each layer."""

    transform: ModelTransform
    scales: Sequence[LayerScales]


class LearnedFolds:
    """Free parameters of a transform and of its smoothing scales, all zero at the start.

    An orthogonal matrix is ``Q C``, Q where it starts and C a Cayley transform (as SpinQuant, arXiv
    2405.16406, descends on the same manifold); a scale is multiplied by an exponential.

    Args:
        transform: where rotations start.
        scales: where S starts, one for each layer; what is not smoothed there is not learned.
        device: of the parameters.
    """

    def __init__(
        self, transform: ModelTransform, scales: Sequence[LayerScales], device: torch.device
    ) -> None:
        spec = transform.spec
        self._transform = transform
        self._scales = scales
        self._starts: dict[str, torch.Tensor] = {}
        if transform.residual is not None:
            identity = torch.eye(spec.hidden, dtype=torch.float64, device=device)
            self._starts[RESIDUAL] = transform.residual.rotate(identity)
        for index in range(spec.layers):
            if spec.rotates_heads(index) and transform.online.down_proj is not None:
                start = head_matrices(*spec.head_sizes(spec.layer_table(index))).to(device)
                self._starts[heads_of(index)] = start
        shapes = {name: start.shape for name, start in self._starts.items()}
        for index, own in enumerate(scales):
            if own.down is not None:
                shapes[down_of(index)] = own.down.shape
            shapes |= {norm_of(index, norm): divisor.shape for norm, divisor in own.norms.items()}
        self.free = {
            name: torch.zeros(shape, device=device, requires_grad=True)
            for name, shape in shapes.items()
        }

    def groups(self) -> list[dict[str, object]]:
        """Parameters and their learning rates, for an optimizer."""
        return [
            {
                "params": [free],
                "lr": ANGLE * free.shape[-1] ** -0.5 if name in self._starts else SCALE_RATE,
            }
            for name, free in self.free.items()
        ]

    def values(self, dtype: torch.dtype = torch.float32) -> Values:
        """What the parameters stand for, with a gradient in them: orthogonal as far as ``dtype``
        is."""
        return {
            name: (
                self._starts[name].to(dtype) @ cayley(free.to(dtype))
                if name in self._starts
                else free.to(dtype).exp()
            )
            for name, free in self.free.items()
        }

    def folded(self, values: Values) -> Folded:
        """What is folded with ``values``, in their dtype."""
        spec, transform = self._transform.spec, self._transform
        if RESIDUAL in values:
            transform = replace(transform, residual=DenseRotation(values[RESIDUAL][None]))
        heads = [values.get(heads_of(index)) for index in range(spec.layers)]
        if any(matrices is not None for matrices in heads):
            transform = replace(transform, heads=heads)
        scales = [_scaled(index, own, values) for index, own in enumerate(self._scales)]
        return Folded(transform, scales)


RESIDUAL = "residual"


def heads_of(index: int) -> str:
    """R2 of a layer."""
    return f"heads.{index}"


def down_of(index: int) -> str:
    """S of a layer's down_proj."""
    return f"down.{index}"


def norm_of(index: int, norm: str) -> str:
    """S of a layer's norm."""
    return f"norm.{index}.{norm}"


def _scaled(index: int, scales: LayerScales, values: Mapping[str, torch.Tensor]) -> LayerScales:
    def times(start: torch.Tensor, name: str) -> torch.Tensor:
        return start.to(values[name]) * values[name]

    return LayerScales(
        None if scales.down is None else times(scales.down, down_of(index)),
        {norm: times(divisor, norm_of(index, norm)) for norm, divisor in scales.norms.items()},
    )


def cayley(free: torch.Tensor) -> torch.Tensor:
    """``(I - A)^-1 (I + A)`` with ``A = (free - free^T) / 4``: orthogonal for any ``free (..., n,
    n)``, the identity for zero.

    Near zero a pair of entries ``free_ij = -free_ji`` is the angle of a turn in the plane of i and
    j.
    """
    skew = (free - free.mT) / 4
    identity = torch.eye(free.shape[-1], dtype=free.dtype, device=free.device)
    return torch.linalg.solve(identity - skew, identity + skew)
