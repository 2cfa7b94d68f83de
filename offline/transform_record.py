# SPDX-License-Identifier: Apache-2.0
"""``smoothrot_transform.st``: what a conversion folded into the weights, for what has to be folded alike later (LoRA adapters).

Signs and Hadamard transforms follow from the manifest's configuration and seed. Stored is what does not: smoothing scales, the
weights of the norms that were folded, learned rotations.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from smoothrot_offline.architectures import resolve
from smoothrot_offline.checkpoint import Checkpoint, file_digest
from smoothrot_offline.headers import CONFIG_NAME, read_json
from smoothrot_offline.manifest import read_manifest
from smoothrot_offline.rotate import DenseRotation
from smoothrot_offline.smooth import LayerScales
from smoothrot_offline.study import LayerStudy
from smoothrot_offline.transform import ModelTransform
from smoothrot_vllm.errors import CheckpointError
from smoothrot_vllm.format import TRANSFORM_NAME

RESIDUAL = "residual"


@dataclass(frozen=True)
class RecordedTransform:
    """A conversion's transform read back.

    ``norms`` are the weights that folded norms had, ``(hidden,)`` by full module name; ``scales`` are S by layer.
    """

    transform: ModelTransform
    norms: dict[str, torch.Tensor]
    scales: list[LayerScales]


def transform_tensors(
    checkpoint: Checkpoint, transform: ModelTransform, studies: Sequence[LayerStudy]
) -> dict[str, torch.Tensor]:
    """Tensors of the file: ``residual`` and ``{layer}heads`` where learned, ``{layer}smoothing``, ``{norm}.smoothing``, and the
    weights of the folded norms.
    """
    spec, found = transform.spec, {}
    if isinstance(transform.residual, DenseRotation):
        found[RESIDUAL] = transform.residual.blocks
    for index, study in enumerate(studies):
        prefix = spec.layer_prefix(index)
        if study.scales.down is not None:
            found[f"{prefix}smoothing"] = study.scales.down
        found |= {f"{prefix}{norm}.smoothing": scales for norm, scales in study.scales.norms.items()}
        if transform.heads is not None:
            found[f"{prefix}heads"] = transform.heads[index].contiguous()
        if transform.residual is not None:
            found |= checkpoint.load([f"{prefix}{norm}.weight" for norm in spec.architecture.readers])
    return found


def read_transform(directory: Path) -> RecordedTransform:
    """The transform of a converted directory.

    Raises:
        CheckpointError: the directory has none, or it is damaged.
        UnsupportedModelError: the model is not one that this version converts.
    """
    path = directory / TRANSFORM_NAME
    if not path.exists():
        raise CheckpointError(f"{path}: expected the transform of a converted model, found none. Convert the model again.")
    manifest, config_file = read_manifest(directory), read_json(directory / CONFIG_NAME)
    quantization = config_file.pop("quantization_config", None)
    named = quantization.get("transform_sha256") if isinstance(quantization, dict) else None
    if (found := file_digest(path)) != named:
        raise CheckpointError(
            f"{path}: expected SHA-256 {named} (quantization_config.transform_sha256), got {found}. Copy the directory again."
        )
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: cannot read: {error}. Convert the model again.") from error
    config = manifest.config
    if manifest.rotations is not None:
        config = config.model_copy(update={"seed": manifest.rotations.seed})
    spec = resolve(config_file)
    transform = ModelTransform.of(spec, config)
    prefixes = [spec.layer_prefix(index) for index in range(spec.layers)]
    if RESIDUAL in tensors:
        transform = replace(transform, residual=DenseRotation(tensors[RESIDUAL]))
    if f"{prefixes[0]}heads" in tensors:
        transform = replace(transform, heads=[tensors[f"{prefix}heads"] for prefix in prefixes])
    norms = {}
    if transform.residual is not None:
        names = [f"{prefix}{norm}" for prefix in prefixes for norm in spec.architecture.readers]
        norms = {name: tensors[f"{name}.weight"] for name in names}
    return RecordedTransform(transform, norms, [_scales(tensors, prefix, spec.architecture.readers) for prefix in prefixes])


def _scales(tensors: dict[str, torch.Tensor], prefix: str, norms: Iterable[str]) -> LayerScales:
    smoothed = {norm: tensors[name] for norm in norms if (name := f"{prefix}{norm}.smoothing") in tensors}
    return LayerScales(tensors.get(f"{prefix}smoothing"), smoothed)
