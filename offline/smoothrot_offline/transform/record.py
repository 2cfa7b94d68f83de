# SPDX-License-Identifier: Apache-2.0
"""``smoothrot_transform.st``: what a conversion folded into the weights, for what has to be folded
alike later (LoRA adapters, draft heads).

Signs and Hadamard transforms follow from the manifest's configuration and seed. Stored is what does
not: smoothing scales, the weights of the norms that were folded, learned rotations.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from smoothrot_offline.check.inspect import model_dtype, open_converted, structure_problems
from smoothrot_offline.decide.study import LayerStudy
from smoothrot_offline.output.manifest import read_manifest
from smoothrot_offline.source.checkpoint import Checkpoint, file_digest
from smoothrot_offline.source.family import ModelSpec
from smoothrot_offline.transform.rotation import DenseRotation
from smoothrot_offline.transform.sides import LayerScales, ModelTransform
from smoothrot_vllm.errors import CheckpointError
from smoothrot_vllm.foreign_files import read_tensors
from smoothrot_vllm.format import TRANSFORM_NAME

RESIDUAL = "residual"


@dataclass(frozen=True)
class RecordedTransform:
    """A conversion's transform read back.

    ``norms`` are the weights that folded norms had, ``(hidden,)`` by full module name, the final
    norm's among them; ``scales`` are S by layer.
    """

    transform: ModelTransform
    norms: dict[str, torch.Tensor]
    scales: list[LayerScales]


def transform_tensors(
    checkpoint: Checkpoint, transform: ModelTransform, studies: Sequence[LayerStudy]
) -> dict[str, torch.Tensor]:
    """Tensors of the file: ``residual`` and ``{layer}heads`` where learned,
    ``{layer}smoothing``, ``{norm}.smoothing``, and the weights of the folded norms."""
    spec, found = transform.spec, dict[str, torch.Tensor]()
    if isinstance(transform.residual, DenseRotation):
        found[RESIDUAL] = transform.residual.blocks
    if transform.residual is not None:
        found |= checkpoint.load([f"{norm}.weight" for norm in folded_norms(spec)])
    for index, study in enumerate(studies):
        prefix = spec.layer_prefix(index)
        if study.scales.down is not None:
            found[f"{prefix}smoothing"] = study.scales.down
        found |= {
            f"{prefix}{norm}.smoothing": scales for norm, scales in study.scales.norms.items()
        }
        if transform.heads is not None and (heads := transform.heads[index]) is not None:
            found[f"{prefix}heads"] = heads.contiguous()
    return found


def folded_norms(spec: ModelSpec) -> list[str]:
    """Full names of the norms whose weights move into what reads them, where R1 is folded."""
    layers = (
        spec.layer_prefix(index) + norm
        for index in range(spec.layers)
        for norm in spec.layer_table(index).norms
    )
    return [*layers, spec.architecture.final_norm]


def read_transform(directory: Path) -> RecordedTransform:
    """The transform of a converted directory.

    Raises:
        CheckpointError: the directory has none, or it is damaged.
        UnsupportedModelError: the model is not one that this version converts.
    """
    path = directory / TRANSFORM_NAME
    if not path.exists():
        raise CheckpointError(
            f"{path}: expected the transform of a converted model, found none. Convert the model"
            " again."
        )
    checkpoint, spec, schema = open_converted(directory)
    manifest = read_manifest(directory)
    expected = spec.output_tensors(schema, spec.tied, model_dtype(checkpoint.config))
    if problem := next(structure_problems(checkpoint, expected, manifest), None):
        raise CheckpointError(
            f"{directory}: {problem}. Copy the directory again, or convert the model again."
        )
    named = schema.transform_sha256
    if (found := file_digest(path)) != named:
        raise CheckpointError(
            f"{path}: expected SHA-256 {named} (quantization_config.transform_sha256), got {found}."
            " Copy the directory again."
        )
    tensors = read_tensors(path, "Convert the model again.")
    config = manifest.config
    if manifest.rotations is not None:
        config = config.model_copy(update={"seed": manifest.rotations.seed})
    _check_shapes(path, spec, tensors)
    transform = ModelTransform.of(spec, config)
    norms_of = {spec.layer_prefix(i): spec.layer_table(i).norms for i in range(spec.layers)}
    if RESIDUAL in tensors:
        transform = replace(transform, residual=DenseRotation(tensors[RESIDUAL]))
    rotated = [f"{p}heads" for i, p in enumerate(norms_of) if spec.rotates_heads(i)]
    if any(name in tensors for name in rotated):
        _refuse_missing(path, tensors, rotated)
        transform = replace(transform, heads=[tensors.get(f"{prefix}heads") for prefix in norms_of])
    norms = {}
    if transform.residual is not None:
        names = folded_norms(spec)
        _refuse_missing(path, tensors, [f"{name}.weight" for name in names])
        norms = {name: tensors[f"{name}.weight"] for name in names}
    return RecordedTransform(
        transform,
        norms,
        [_scales(tensors, prefix, own) for prefix, own in norms_of.items()],
    )


def _check_shapes(path: Path, spec: ModelSpec, tensors: Mapping[str, torch.Tensor]) -> None:
    """Refuse tensors that are no part of this model's transform, or of other shapes."""
    shapes: dict[str, tuple[int, ...]] = {
        f"{norm}.weight": (spec.hidden,) for norm in folded_norms(spec)
    }
    for index in range(spec.layers):
        prefix = spec.layer_prefix(index)
        shapes[f"{prefix}smoothing"] = (sum(spec.down_widths(index)),)
        if spec.rotates_heads(index):
            kv_heads, head_dim = spec.head_sizes(spec.layer_table(index))
            shapes[f"{prefix}heads"] = (kv_heads, head_dim, head_dim)
        shapes |= {
            f"{prefix}{norm}.smoothing": (spec.hidden,) for norm in spec.layer_table(index).norms
        }
    for name, tensor in tensors.items():
        found = tuple(tensor.shape)
        # Blocks of R1, each of them square.
        fits = (
            found[1:] == found[-1:] * 2 and found[0] * found[-1] == spec.hidden
            if name == RESIDUAL
            else found == shapes.get(name)
        )
        if not fits or not tensor.is_floating_point() or not tensor.isfinite().all():
            raise CheckpointError(
                f"{path}: tensor {name}: expected finite floats of shape"
                f" {shapes.get(name, 'none by this name')}, got {tensor.dtype} {found}. Convert the"
                " model again."
            )


def _refuse_missing(path: Path, tensors: Mapping[str, torch.Tensor], names: Iterable[str]) -> None:
    if missing := [name for name in names if name not in tensors]:
        raise CheckpointError(
            f"{path}: tensor {missing[0]} (one of {len(missing)}) is missing. Convert the model"
            " again."
        )


def _scales(tensors: dict[str, torch.Tensor], prefix: str, norms: Iterable[str]) -> LayerScales:
    smoothed = {
        norm: tensors[name] for norm in norms if (name := f"{prefix}{norm}.smoothing") in tensors
    }
    return LayerScales(tensors.get(f"{prefix}smoothing"), smoothed)
