# SPDX-License-Identifier: Apache-2.0
"""What was decided on a calibrated model, as a JSON object and named tensors, and back."""

from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

import torch
from pydantic import BaseModel

from smoothrot_offline.config import ConvertConfig
from smoothrot_offline.decide.stages import Decisions
from smoothrot_offline.decide.study import LayerStudy
from smoothrot_offline.output.manifest import LearnedRecord, SmoothingRecord
from smoothrot_offline.source.family import ModelSpec
from smoothrot_offline.transform.rotation import DenseRotation
from smoothrot_offline.transform.sides import LayerScales, ModelTransform
from smoothrot_vllm.format import QuantizationSchema

Record = TypeVar("Record", bound=BaseModel)


def pack_decisions(found: Decisions) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """A JSON object and named tensors, which :func:`unpack_decisions` takes."""
    tensors = {"tokens": found.calibration}
    for index, study in enumerate(found.studies):
        if study.scales.down is not None:
            tensors[f"scales.{index}"] = study.scales.down
        tensors |= {f"scales.{index}.{norm}": scales for norm, scales in study.scales.norms.items()}
    for kind, layers in (("weights", found.token_weights), ("moments", found.output_moments)):
        for index, layer in enumerate(layers):
            tensors |= {f"{kind}.{index}.{linear}": own for linear, own in layer.items()}
    if isinstance(found.transform.residual, DenseRotation):
        tensors["residual"] = found.transform.residual.blocks
    tensors |= {
        f"heads.{index}": matrices
        for index, matrices in enumerate(found.transform.heads or [])
        if matrices is not None
    }
    facts = {
        "schema": found.schema.model_dump(mode="json"),
        "seed": found.transform.seed,
        "sign_losses": list(found.sign_losses.items()),
        "learned": found.learned and found.learned.model_dump(mode="json"),
        "studies": [
            {
                "smoothing": study.smoothing and study.smoothing.model_dump(mode="json"),
                "clips": study.clips,
                "sensitivity": study.sensitivity,
                "experts": [record and record.model_dump(mode="json") for record in study.experts],
            }
            for study in found.studies
        ],
    }
    return facts, {name: tensor.contiguous() for name, tensor in tensors.items()}


def unpack_decisions(
    facts: dict[str, Any], tensors: dict[str, torch.Tensor], spec: ModelSpec, config: ConvertConfig
) -> Decisions:
    """Decisions that were packed, of a model and its options.

    Raises:
        KeyError, TypeError, ValueError, AttributeError, IndexError: they are not of that form.
    """
    transform = ModelTransform.of(spec, config.model_copy(update={"seed": facts["seed"]}))
    if "residual" in tensors:
        transform = replace(transform, residual=DenseRotation(tensors["residual"]))
    heads = [tensors.get(f"heads.{index}") for index in range(spec.layers)]
    if any(matrices is not None for matrices in heads):
        transform = replace(transform, heads=heads)
    studies = [
        LayerStudy(
            _unpacked_scales(tensors, index, spec),
            record_or_none(SmoothingRecord, study["smoothing"]),
            study["clips"],
            study["sensitivity"],
            [record_or_none(SmoothingRecord, record) for record in study["experts"]],
        )
        for index, study in enumerate(facts["studies"])
    ]
    learned = record_or_none(LearnedRecord, facts["learned"])
    schema = QuantizationSchema.model_validate(facts["schema"])
    by_linear = partial(_by_linear, tensors, spec)
    return Decisions(
        tensors["tokens"],
        studies,
        schema,
        transform,
        dict(facts["sign_losses"]),
        learned,
        token_weights=by_linear("weights") if config.weighs_tokens else [],
        output_moments=by_linear("moments") if config.relates_outputs else [],
    )


def _by_linear(
    tensors: dict[str, torch.Tensor], spec: ModelSpec, kind: str
) -> list[dict[str, torch.Tensor]]:
    return [
        {
            linear: tensors[name]
            for linear in spec.layer_table(index).linears
            if (name := f"{kind}.{index}.{linear}") in tensors
        }
        for index in range(spec.layers)
    ]


def _unpacked_scales(tensors: dict[str, torch.Tensor], index: int, spec: ModelSpec) -> LayerScales:
    names = {norm: f"scales.{index}.{norm}" for norm in spec.layer_table(index).norms}
    smoothed = {norm: tensors[name] for norm, name in names.items() if name in tensors}
    return LayerScales(tensors.get(f"scales.{index}"), smoothed)


def record_or_none(kind: type[Record], value: Any) -> Record | None:
    """The record that a JSON value holds, if it is one."""
    return None if value is None else kind.model_validate(value)
