# SPDX-License-Identifier: Apache-2.0
"""The folds of a conversion as data: what each linear of a layer is multiplied by on its two sides.

A linear computes ``y = x W^T + b`` with W stored ``(out, in)``. Every fold turns W to ``L W R``: a
matrix on the side of the input, whose inverse goes into what produces the input or is left to the
server, or one on the side of the output, which the bias is multiplied by too (QuaRot, arXiv
2404.00456; SpinQuant, arXiv 2405.16406). A conversion applies them to weights in the order they are
listed, an adapter's factors A and B are given those of their side.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Self

import torch

from smoothrot_offline.config import ConvertConfig, folds_residual, online_rotations
from smoothrot_offline.source.architecture import Architecture
from smoothrot_offline.source.family import ModelSpec
from smoothrot_offline.transform.rotation import (
    IDENTITY,
    Orthogonal,
    Tensors,
    hadamard,
    head_rotations,
    random_rotation,
    random_signs,
)
from smoothrot_vllm.errors import CheckpointError
from smoothrot_vllm.format import Online

Rows = Callable[[torch.Tensor], torch.Tensor]
"""``x M`` of float64 ``x (..., n)`` for some matrix M."""


@dataclass(frozen=True)
class Factor:
    """A matrix M on one side of a linear: ``W M`` of its input, or ``M^T W`` and ``b M`` of its
    output.

    ``last`` says that only so many of the last rows are concerned, those of the last linear of a
    fused one. The inverse of an ``online`` factor is left to the server, which an adapter reads its
    input before.
    """

    times: Rows
    output: bool = False
    last: int | None = None
    online: bool = False

    def of_weight(self, weight: torch.Tensor) -> torch.Tensor:
        """Of float64 ``(out, in)``: a weight, or an adapter's A or B on its own side."""
        return (
            self._of_rows(weight, lambda rows: self.times(rows.T).T)
            if self.output
            else (self.times(weight))
        )

    def of_bias(self, bias: torch.Tensor) -> torch.Tensor:
        """Of float64 ``(out,)``."""
        return self._of_rows(bias, self.times) if self.output else bias

    def _of_rows(self, tensor: torch.Tensor, change: Rows) -> torch.Tensor:
        if self.last is None:
            return change(tensor).contiguous()
        return torch.cat([tensor[: -self.last], change(tensor[-self.last :])])


Sides = dict[str, list[Factor]]
"""The factors of linears, named relative to their layer, in the order they are applied."""


@dataclass(frozen=True)
class LayerScales:
    """Smoothing scales of one decoder layer, float64, positive.

    ``down`` divides the input of each down_proj, one after another, ``(sum of down_widths,)``; or
    None. ``norms`` divide what each norm named gives out, ``(hidden,)``.

    Raises:
        CheckpointError: a scale is zero, negative or not finite.
    """

    down: torch.Tensor | None = None
    norms: Mapping[str, torch.Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        named = {**self.norms, **({} if self.down is None else {"down_proj": self.down})}
        for where, scales in named.items():
            if not (scales.isfinite() & (scales > 0)).all():
                raise CheckpointError(
                    f"smoothing scales of {where}: expected positive finite numbers. Check the"
                    " calibration text."
                )


def smoothing(spec: ModelSpec, index: int, scales: torch.Tensor) -> Sides:
    """S: the input of each down_proj is divided by its part of ``scales`` in what up_proj gives
    out."""
    sides: Sides = {}
    parts = scales.split(spec.down_widths(index))
    for (up, down), own in zip(spec.layer_table(index).products, parts, strict=True):
        sides[up] = [Factor(_scaled(1 / own), output=True, last=len(own))]
        sides[down] = [Factor(_scaled(own))]
    return sides


def residual_rotation(
    table: Architecture, gammas: Mapping[str, torch.Tensor], rotation: Orthogonal
) -> Sides:
    """R1: the residual stream becomes ``x Q``. What each norm multiplies by, ``gammas (hidden,)``,
    moves into its readers first: only a unit norm commutes with Q."""
    sides: Sides = {}
    for norm, readers in table.readers.items():
        for reader in readers:
            sides[reader] = [Factor(_scaled(gammas[norm])), Factor(rotation.rotate)]
    for writer in table.writers:
        sides[writer] = [Factor(rotation.rotate, output=True)]
    return sides


def norm_smoothing(table: Architecture, scales: Mapping[str, torch.Tensor]) -> Sides:
    """S behind norms: the norm's weight is divided by ``scales``, see
    :meth:`ModelTransform.norms`."""
    return {
        reader: [Factor(_scaled(divisor))]
        for norm, divisor in scales.items()
        for reader in table.readers[norm]
    }


def online_residual_rotation(table: Architecture, block: int) -> Sides:
    """R1 where it cannot be folded: the server rotates what the norms give out as it stands, but
    for 16-bit readers."""
    return {reader: [Factor(_turned(block), online=True)] for reader in table.quantized_readers}


def head_rotation(spec: ModelSpec, index: int, matrices: torch.Tensor | None = None) -> Sides:
    """R2: each head of the value projection is rotated, and undone in the output projection, of
    each layer that shares the values too; nothing in a layer without a place for it.

    Attention mixes tokens, not the channels of a head, and its weights sum to one, so a value bias
    rotates like a value. Every query head of a group reads the same rotated value head.

    Args:
        matrices: orthogonal, float64 ``(kv_heads, head_dim, head_dim)``; None rotates every head by
            its Hadamard transform.
    """
    if not spec.rotates_heads(spec.values_of(index)):
        return {}
    table = spec.layer_table(index)
    kv_heads, head_dim = spec.head_sizes(table)
    width = kv_heads * head_dim
    values, outputs = head_rotations(width, spec.heads * head_dim, head_dim, matrices)
    sides = {table.output: [Factor(outputs.rotate)]}
    if table.latent_attention is not None:
        keys = getattr(spec.config, table.latent_attention.keys)
        among = _among_keys(values.rotate, keys, head_dim)
        sides[table.value] = [Factor(among, output=True)]
    elif table.value:
        sides[table.value] = [Factor(values.rotate, output=True, last=width)]
    return sides


def down_rotation(spec: ModelSpec, index: int, seed: int, online: Online) -> Sides:
    """R4: random signs go into the rows of up_proj, ``D (I (x) H)`` into the inputs of down_proj.

    The gated product ``act(gate) * up`` is linear in ``up``, so what the server has left to do is
    the Hadamard transform of down_proj's input, without signs. The experts of a layer share the
    signs. A product that is not linear in ``up`` is rotated without any.
    """
    sides: Sides = {}
    table = spec.layer_table(index)
    for up, down in table.products:
        if (rotation := online.rotation(down)) is not None:
            sides[down] = [Factor(_turned(rotation.block), online=True)]
            if table.scales_products:
                signs = _scaled(random_signs(rotation.size, seed, f"R4/{index}"))
                sides[up] = [Factor(signs, output=True, last=rotation.size)]
                sides[down].insert(0, Factor(signs))
    return sides


def fold(layer: Tensors, sides: Sides) -> None:
    """Multiply the linears of a layer, float64 tensors by names relative to it, by their factors,
    in place of the entries that change."""
    for linear, factors in sides.items():
        weight, bias = f"{linear}.weight", f"{linear}.bias"
        for factor in factors:
            layer[weight] = factor.of_weight(layer[weight])
            if bias in layer and factor.output:
                layer[bias] = factor.of_bias(layer[bias])


@dataclass(frozen=True)
class ModelTransform:
    """What is folded into one model's weights. ``residual`` (R1) is None when the residual stream
    is not rotated; ``heads`` (R2) are the matrices of each layer, float64 ``(kv_heads, head_dim,
    head_dim)``, None for a layer that computes no values or has no place for R2, or None for
    Hadamard transforms.

    The transformed model computes the original's logits, if the server applies the ``online``
    rotations.
    """

    spec: ModelSpec
    seed: int
    residual: Orthogonal | None
    online: Online
    heads: Sequence[torch.Tensor | None] | None = None

    @classmethod
    def of(cls, spec: ModelSpec, config: ConvertConfig) -> Self:
        """The transform that a configuration asks for.

        Raises:
            UnsupportedModelError: a size has no Hadamard block.
        """
        folded = folds_residual(spec, config)
        residual = random_rotation(spec.hidden, config.seed) if folded else None
        return cls(spec, config.seed, residual, online_rotations(spec, config))

    @classmethod
    def of_norms(cls, spec: ModelSpec) -> Self:
        """Only the fold of the norms into their readers."""
        return cls(spec, 0, IDENTITY, Online())

    def sides(self, index: int, gammas: Mapping[str, torch.Tensor], scales: LayerScales) -> Sides:
        """The factors of each linear of decoder layer ``index``.

        Args:
            index: which layer.
            gammas: what each norm multiplies by, float64 ``(hidden,)``, where R1 is folded.
            scales: S.
        """
        spec, table, found = self.spec, self.spec.layer_table(index), list[Sides]()
        if scales.down is not None:
            found.append(smoothing(spec, index, scales.down))
        if self.residual is not None:
            found.append(residual_rotation(table, gammas, self.residual))
        found.append(norm_smoothing(table, scales.norms))
        if self.online.readers is not None:
            found.append(online_residual_rotation(table, self.online.readers.block))
        if self.online.down_proj is not None:
            heads = None if self.heads is None else self.heads[spec.values_of(index)]
            found.append(head_rotation(spec, index, heads))
            found.append(down_rotation(spec, index, self.seed, self.online))
        return {
            linear: [factor for part in found for factor in part.get(linear, [])]
            for linear in table.linears
        }

    def layer(self, index: int, tensors: Tensors, scales: LayerScales) -> None:
        """Transform the float64 tensors of decoder layer ``index``, in place; ``scales`` are S."""
        gammas = self._gammas(index, tensors)
        fold(tensors, self.sides(index, gammas, scales))
        for norm, gamma in self.norms(gammas, scales).items():
            tensors[f"{norm}.weight"] = gamma - self.spec.layer_table(index).norm_offset

    def _gammas(self, index: int, tensors: Mapping[str, torch.Tensor]) -> Tensors:
        """What each norm of a layer multiplies by."""
        table = self.spec.layer_table(index)
        return {norm: tensors[f"{norm}.weight"] + table.norm_offset for norm in table.norms}

    def output_moments(
        self,
        index: int,
        tensors: Mapping[str, torch.Tensor],
        scales: LayerScales,
        moments: Mapping[str, torch.Tensor],
    ) -> Tensors:
        """Second moments of the gradients in what linears of decoder layer ``index`` give out, as
        the transformed ones give it out: ``M^-1 O M^-T`` where ``y`` becomes ``y M``.

        Args:
            tensors: the layer's, not transformed.
            scales: S.
            moments: by linear, ``(out, out)``.
        """
        sides = self.sides(index, self._gammas(index, tensors), scales)
        return {
            linear: _of_changed_output(moment.double(), sides[linear])
            for linear, moment in moments.items()
        }

    def norms(
        self, gammas: Mapping[str, torch.Tensor], scales: LayerScales
    ) -> dict[str, torch.Tensor]:
        """What is left of what each norm that changes multiplies by, float64 ``(hidden,)``."""
        left = {}
        if self.residual is not None:
            left = {norm: torch.ones_like(gamma) for norm, gamma in gammas.items()}
        for norm, divisor in scales.norms.items():
            left[norm] = left.get(norm, gammas[norm]) / divisor
        return left

    def embedding(self, rows: torch.Tensor) -> torch.Tensor:
        """Embedding rows, float64 ``(rows, hidden)``, in the rotated residual stream."""
        return rows if self.residual is None else self.residual.rotate(rows)

    def beside(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """A tensor beside the text tower, or the layers: the output of what writes into the
        residual stream is rotated, in float64; everything else is as it was."""
        composite = self.spec.composite
        if self.residual is None or composite is None or not composite.writes(name):
            return tensor
        factor, tensor = Factor(self.residual.rotate, output=True), tensor.double()
        return factor.of_bias(tensor) if name.endswith(".bias") else factor.of_weight(tensor)

    def head(self, rows: torch.Tensor, gamma: torch.Tensor) -> torch.Tensor:
        """Head rows, float64 ``(rows, hidden)``, with the final norm's stored weight ``gamma
        (hidden,)`` folded in, then R1."""
        offset = self.spec.architecture.norm_offset
        return rows if self.residual is None else self.residual.rotate(rows * (gamma + offset))

    def hidden(self, rows: torch.Tensor, gamma: torch.Tensor) -> torch.Tensor:
        """What the final norm gives out, float64 ``(rows, hidden)``, as the transformed model's
        gives it out; ``gamma (hidden,)`` is the weight it had. :meth:`head` reads it so."""
        offset = self.spec.architecture.norm_offset
        return rows if self.residual is None else self.residual.rotate(rows / (gamma + offset))

    def final_norm(self, gamma: torch.Tensor) -> torch.Tensor:
        """What is left of the final norm's stored weight."""
        return (
            gamma
            if self.residual is None
            else torch.full_like(gamma, 1 - self.spec.architecture.norm_offset)
        )


def _among_keys(rotate: Rows, keys: int, head_dim: int) -> Rows:
    """``rotate`` of the values of all heads, each of which is behind ``keys`` channels of keys."""

    def times(rows: torch.Tensor) -> torch.Tensor:
        heads = rows.unflatten(-1, (-1, keys + head_dim))
        turned = rotate(heads[..., keys:].flatten(-2)).unflatten(-1, (-1, head_dim))
        return torch.cat([heads[..., :keys], turned], dim=-1).flatten(-2)

    return times


def _of_changed_output(moment: torch.Tensor, factors: Sequence[Factor]) -> torch.Tensor:
    changed = torch.eye(len(moment), dtype=moment.dtype, device=moment.device)
    for factor in factors:
        if factor.output:
            changed = factor.of_weight(changed)
    half = torch.linalg.solve(changed.T, moment)
    return torch.linalg.solve(changed.T, half.T)


def _scaled(factors: torch.Tensor) -> Rows:
    return lambda rows: rows * factors.to(rows)


def _turned(block: int) -> Rows:
    return lambda rows: hadamard(rows, block)
