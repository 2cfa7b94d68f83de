# SPDX-License-Identifier: Apache-2.0
"""Everything a conversion decides by measurement, before it writes: scales, clips, 8-bit layers,
signs, rotations."""

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from smoothrot_offline.config import ConvertConfig
from smoothrot_offline.decide.rotations import learn_rotations, learning_steps, trial_loss
from smoothrot_offline.decide.smoothing import smooth_norms
from smoothrot_offline.decide.study import LayerStudy, Study, allocate
from smoothrot_offline.output.directory import JOURNAL_NAME
from smoothrot_offline.output.manifest import LearnedRecord, SmoothingRecord
from smoothrot_offline.source.checkpoint import Checkpoint, source_dtype
from smoothrot_offline.source.family import ModelSpec
from smoothrot_offline.source.layers import LayerRunner, embed, layers_ahead
from smoothrot_offline.source.text import load_calibration
from smoothrot_offline.transform.rotation import DenseRotation
from smoothrot_offline.transform.sides import LayerScales, ModelTransform
from smoothrot_vllm.errors import ResumeError
from smoothrot_vllm.format import QuantizationSchema

_log = logging.getLogger(__name__)

HELD_OUT_SAMPLES = 8
"""Calibration sequences that only the choice of the signs sees."""


@dataclass(frozen=True)
class Decisions:
    """What the measurements led to.

    ``tokens`` are the calibration tokens int64 ``(samples, seqlen)``, None if the model is not run;
    ``studies`` has one entry for each layer; ``schema`` carries the overrides; ``transform`` the
    chosen signs and learned rotations; ``sign_losses`` the held-out loss of each seed tried, in
    nats; ``learned`` what learning the rotations led to, if they were.
    """

    tokens: torch.Tensor | None
    studies: list[LayerStudy]
    schema: QuantizationSchema
    transform: ModelTransform
    sign_losses: dict[int, float]
    learned: LearnedRecord | None


def count_steps(spec: ModelSpec, config: ConvertConfig) -> int:
    """How often :func:`decide` reports progress."""
    studied = spec.layers if config.scales != "none" or config.needs_probe else 0
    learned = learning_steps(spec) if config.learns_rotations else 0
    anew = spec.layers if smooths_anew(spec, config) else 0
    return 1 + studied + (config.sign_seeds if config.sign_seeds > 1 else 0) + learned + anew


def smooths_anew(spec: ModelSpec, config: ConvertConfig) -> bool:
    """Whether the rotation before the norms' smoothing is chosen after the study, which smoothed
    behind another one."""
    chosen_later = config.sign_seeds > 1 or config.learns_rotations
    return (
        config.smooths_norms
        and config.rotate
        and spec.architecture.rotates_residual
        and chosen_later
    )


def decide(
    checkpoint: Checkpoint,
    spec: ModelSpec,
    config: ConvertConfig,
    schema: QuantizationSchema,
    step: Callable[[str], None],
) -> Decisions:
    """Load the calibration text, study every layer, and choose.

    Args:
        checkpoint, spec, config: of the conversion.
        schema: the bits and groups asked for.
        step: told what begins, ``count_steps`` times.

    Raises:
        ConfigError: the calibration text cannot be had.
        CheckpointError: the model's activations are not finite.
    """
    step("calibration text" if config.needs_calibration else "starting")
    transform = ModelTransform.of(spec, config)
    nothing = [LayerStudy()] * spec.layers
    dtype = source_dtype(checkpoint, f"{spec.architecture.embedding}.weight")
    if not config.needs_calibration:
        return Decisions(None, nothing, schema, transform, {}, None)
    held_out = HELD_OUT_SAMPLES if config.sign_seeds > 1 else 0
    samples = config.calib_samples + held_out
    tokens = load_calibration(
        config.calib, checkpoint.path, samples, config.calib_seqlen, config.seed, checkpoint.device
    )
    tokens, kept_back = tokens[: config.calib_samples], tokens[config.calib_samples :]
    studies = nothing
    if config.scales != "none" or config.needs_probe:
        studies = _study(checkpoint, spec, config, schema, transform, tokens, dtype, step)
        schema = allocate(spec, config, schema, studies)
    losses = {}
    if config.sign_seeds > 1:
        # The study's scales of the norms belong to the rotation by its own seed.
        plain = [replace(study, scales=replace(study.scales, norms={})) for study in studies]
        transforms = {}
        for seed in range(config.seed, config.seed + config.sign_seeds):
            step(f"signs of seed {seed}")
            transforms[seed] = ModelTransform.of(spec, config.model_copy(update={"seed": seed}))
            losses[seed] = trial_loss(checkpoint, spec, schema, transforms[seed], plain, kept_back)
        transform = transforms[min(losses, key=lambda seed: losses[seed])]
    learned = None
    if config.learns_rotations:
        # From the chosen signs. Clips and costs are those that the study found with Hadamard
        # rotations.
        transform, learned = learn_rotations(
            checkpoint, spec, config, schema, transform, tokens, step
        )
    if smooths_anew(spec, config):
        norms = smooth_norms(checkpoint, spec, transform.residual, tokens, dtype, step)
        studies = [
            replace(study, scales=replace(study.scales, norms=own))
            for study, own in zip(studies, norms, strict=True)
        ]
    return Decisions(tokens, studies, schema, transform, losses, learned)


def _study(
    checkpoint: Checkpoint,
    spec: ModelSpec,
    config: ConvertConfig,
    schema: QuantizationSchema,
    transform: ModelTransform,
    tokens: torch.Tensor,
    dtype: torch.dtype,
    step: Callable[[str], None],
) -> list[LayerStudy]:
    name = f"{spec.architecture.embedding}.weight"
    hidden = embed(tokens, checkpoint.load([name])[name], spec.embedding_scale)
    study = Study(LayerRunner(spec), spec, config, schema, transform, hidden, dtype)
    found = []
    for index, loaded in enumerate(layers_ahead(checkpoint, spec, range(spec.layers))):
        step(f"studying layer {index + 1} of {spec.layers}")
        found.append(study.layer(index, loaded))
    _warn_of_unseen_experts(found)
    return found


def _warn_of_unseen_experts(studies: list[LayerStudy]) -> None:
    unseen = {
        index: study.unseen_experts for index, study in enumerate(studies) if study.unseen_experts
    }
    if unseen:
        where = "; ".join(
            f"layer {index}: {', '.join(map(str, experts))}" for index, experts in unseen.items()
        )
        _log.warning(
            "calibration: no token was routed to these experts, which are not smoothed (scales 1):"
            " %s. Use a longer or more varied text (--calib, --calib-samples) if they matter.",
            where,
        )


def pack_decisions(found: Decisions) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Decisions on a calibrated model as a JSON object and named tensors, which
    :func:`unpack_decisions` takes."""
    assert found.tokens is not None
    tensors = {"tokens": found.tokens}
    for index, study in enumerate(found.studies):
        if study.scales.down is not None:
            tensors[f"scales.{index}"] = study.scales.down
        tensors |= {f"scales.{index}.{norm}": scales for norm, scales in study.scales.norms.items()}
    if isinstance(found.transform.residual, DenseRotation):
        tensors["residual"] = found.transform.residual.blocks
    tensors |= {
        f"heads.{index}": matrices for index, matrices in enumerate(found.transform.heads or [])
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
    """The decisions that :func:`pack_decisions` packed.

    Raises:
        ResumeError: they are not of that form.
    """
    try:
        return _unpacked(facts, tensors, spec, config)
    except (
        KeyError,
        TypeError,
        ValueError,
        AttributeError,
        IndexError,
    ) as error:  # pydantic's is a ValueError
        reason = " ".join(repr(error).split())
        raise ResumeError(
            f"{JOURNAL_NAME}: decisions: expected what an interrupted conversion wrote: {reason}."
            " Remove the partial output to start over."
        ) from error


def _unpacked(
    facts: dict[str, Any], tensors: dict[str, torch.Tensor], spec: ModelSpec, config: ConvertConfig
) -> Decisions:
    transform = ModelTransform.of(spec, config.model_copy(update={"seed": facts["seed"]}))
    if "residual" in tensors:
        transform = replace(transform, residual=DenseRotation(tensors["residual"]))
    if "heads.0" in tensors:
        transform = replace(
            transform, heads=[tensors[f"heads.{index}"] for index in range(spec.layers)]
        )
    studies = [
        LayerStudy(
            _unpacked_scales(tensors, index, spec),
            study["smoothing"] and SmoothingRecord.model_validate(study["smoothing"]),
            study["clips"],
            study["sensitivity"],
            [record and SmoothingRecord.model_validate(record) for record in study["experts"]],
        )
        for index, study in enumerate(facts["studies"])
    ]
    learned = facts["learned"] and LearnedRecord.model_validate(facts["learned"])
    schema = QuantizationSchema.model_validate(facts["schema"])
    return Decisions(
        tensors["tokens"], studies, schema, transform, dict(facts["sign_losses"]), learned
    )


def _unpacked_scales(tensors: dict[str, torch.Tensor], index: int, spec: ModelSpec) -> LayerScales:
    names = {norm: f"scales.{index}.{norm}" for norm in spec.architecture.readers}
    smoothed = {norm: tensors[name] for norm, name in names.items() if name in tensors}
    return LayerScales(tensors.get(f"scales.{index}"), smoothed)
