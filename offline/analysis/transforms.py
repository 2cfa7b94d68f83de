# SPDX-License-Identifier: Apache-2.0
"""The transforms of each input of a decoder layer whose quantisation is measured.

Each is what the converter folds, on the linear's input alone: rotating its output as well changes
neither its input nor, in exact arithmetic, any Frobenius norm. Where R1 is folded, a layer is run
with its norms folded, so what is captured behind a norm is the unit norm's output: R needs exactly
that, and the original model's input is its product with gamma.
"""

from collections.abc import Mapping
from dataclasses import replace

import torch

from smoothrot_offline.analysis.measure import Transform
from smoothrot_offline.architectures import ModelSpec
from smoothrot_offline.rotate import Rotation, Tensors, random_rotation, random_signs
from smoothrot_vllm.hadamard import choose_block

KINDS = ("qkv", "o_proj", "gate_up", "down_proj")
"""The inputs of a decoder layer, in the order of
:meth:`~smoothrot_offline.architectures.Architecture.input_groups`."""

DOWN = KINDS[-1]
NONE, SMOOTHED, ROTATED, SMOOTHED_ROTATED = "none", "S", "R", "S+R"
TRANSFORMS = (NONE, SMOOTHED, ROTATED, SMOOTHED_ROTATED)


def layer_transforms(
    spec: ModelSpec,
    seed: int,
    index: int,
    layer: Tensors,
    scales: Mapping[str, torch.Tensor],
    norms: Mapping[str, torch.Tensor],
) -> dict[str, dict[str, Transform]]:
    """Transforms of each kind of input of decoder layer ``index``.

    Args:
        spec: the model's sizes and names.
        seed: of the random signs, as in a conversion.
        index: which layer.
        layer: its original tensors, float64, by names relative to it.
        scales: smoothing scales by policy, float64 ``(f,)``; those of ``max`` are S.
        norms: smoothing scales of what each norm gives out, float64 ``(hidden,)``: S behind a norm.

    Returns:
        By kind, the transforms by name, ``none`` first; at ``down_proj`` also each policy's S and
        R4 under its name, and under :func:`converted` of its name with the converter's quantisers.

    Raises:
        UnsupportedModelError: a size has no Hadamard block.
    """
    table = spec.architecture
    groups = dict(zip(KINDS, table.input_groups(), strict=True))
    weights = {
        kind: torch.cat([layer[f"{linear}.weight"] for linear in group])
        for kind, group in groups.items()
    }
    found = {}
    for kind, norm in zip(("qkv", "gate_up"), table.readers, strict=True):
        if table.rotates_residual:
            gamma = layer[f"{norm}.weight"] + table.norm_offset
            found[kind] = _read_from_unit_norm(
                weights[kind], gamma, random_rotation(spec.hidden, seed), norms[norm]
            )
        else:
            online = _hadamard(spec.hidden)
            found[kind] = {
                NONE: _plain(weights[kind]),
                ROTATED: _rotated(weights[kind], online),
                SMOOTHED_ROTATED: _rotated(weights[kind], online, norms[norm]),
            }
    heads = _hadamard(spec.heads * spec.head_dim, choose_block(spec.head_dim).size)
    found["o_proj"] = {NONE: _plain(weights["o_proj"]), ROTATED: _rotated(weights["o_proj"], heads)}
    online = Rotation(
        random_signs(spec.intermediate, seed, f"R4/{index}"), choose_block(spec.intermediate).size
    )
    found[DOWN] = _down(weights[DOWN], online, scales)
    return {kind: found[kind] for kind in KINDS}


def converted(policy: str) -> str:
    """The name of a policy's transform with the converter's quantisers."""
    return f"{policy}, converted"


def _hadamard(size: int, block: int | None = None) -> Rotation:
    """A rotation without random signs, in the largest blocks unless ``block`` is given."""
    return Rotation(torch.ones(size, dtype=torch.float64), block or choose_block(size).size)


def _plain(weight: torch.Tensor) -> Transform:
    return Transform(lambda x: x, weight.float())


def _rotated(
    weight: torch.Tensor, rotation: Rotation, scales: torch.Tensor | None = None
) -> Transform:
    """S, if ``scales`` are given, and then the rotation."""
    divisor = (
        torch.ones(weight.shape[1], dtype=torch.float64, device=weight.device)
        if scales is None
        else scales
    )
    return Transform(
        lambda x: rotation.rotate(x / divisor).float(), rotation.rotate(weight * divisor).float()
    )


def _read_from_unit_norm(
    weight: torch.Tensor, gamma: torch.Tensor, rotation: Rotation, scales: torch.Tensor
) -> dict[str, Transform]:
    """``scales`` divide the rotated input, where the norm's weight is."""
    return {
        NONE: Transform(lambda x: x * gamma.float(), weight.float()),
        ROTATED: _rotated(weight * gamma, rotation),
        SMOOTHED_ROTATED: Transform(
            lambda x: (rotation.rotate(x.double()) / scales).float(),
            (rotation.rotate(weight * gamma) * scales).float(),
        ),
    }


def _down(
    weight: torch.Tensor, rotation: Rotation, scales: Mapping[str, torch.Tensor]
) -> dict[str, Transform]:
    smoothing = scales["max"]
    return {
        NONE: _plain(weight),
        SMOOTHED: Transform(lambda x: (x / smoothing).float(), (weight * smoothing).float()),
        ROTATED: _rotated(weight, rotation),
        SMOOTHED_ROTATED: _rotated(weight, rotation, smoothing),
    } | _policies(weight, rotation, scales)


def _policies(
    weight: torch.Tensor, rotation: Rotation, scales: Mapping[str, torch.Tensor]
) -> dict[str, Transform]:
    plain = {policy: _rotated(weight, rotation, own) for policy, own in scales.items()}
    return plain | {
        converted(policy): replace(transform, converted=True) for policy, transform in plain.items()
    }
