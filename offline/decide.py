# SPDX-License-Identifier: Apache-2.0
"""Everything a conversion decides by measurement, before it writes: scales, clips, 8-bit layers, signs, rotations."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from smoothrot_offline.allocate import allocate
from smoothrot_offline.architectures import ModelSpec
from smoothrot_offline.calibrate import LayerRunner, embed
from smoothrot_offline.calibration_data import load_calibration
from smoothrot_offline.checkpoint import Checkpoint
from smoothrot_offline.config import ConvertConfig
from smoothrot_offline.manifest import LearnedRecord
from smoothrot_offline.rotations.stage import learn_rotations, learning_steps
from smoothrot_offline.signs import trial_loss
from smoothrot_offline.study import LayerStudy, Study
from smoothrot_offline.transform import ModelTransform
from smoothrot_vllm.format import QuantizationSchema

HELD_OUT_SAMPLES = 8
"""Calibration sequences that only the choice of the signs sees."""


@dataclass(frozen=True)
class Decisions:
    """What the measurements led to.

    ``tokens`` are the calibration tokens int64 ``(samples, seqlen)``, None if the model is not run; ``studies`` has one entry for
    each layer; ``schema`` carries the overrides; ``transform`` the chosen signs and learned rotations; ``sign_losses`` the
    held-out loss of each seed tried, in nats; ``learned`` what learning the rotations led to, if they were.
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
    return 1 + studied + (config.sign_seeds if config.sign_seeds > 1 else 0) + learned


def decide(
    checkpoint: Checkpoint, spec: ModelSpec, config: ConvertConfig, schema: QuantizationSchema, step: Callable[[str], None]
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
    if not config.needs_calibration:
        return Decisions(None, nothing, schema, transform, {}, None)
    held_out = HELD_OUT_SAMPLES if config.sign_seeds > 1 else 0
    samples = config.calib_samples + held_out
    tokens = load_calibration(config.calib, checkpoint.path, samples, config.calib_seqlen, config.seed)
    tokens, kept_back = tokens[: config.calib_samples], tokens[config.calib_samples :]
    studies = nothing
    if config.scales != "none" or config.needs_probe:
        studies = _study(checkpoint, spec, config, schema, transform, tokens, step)
        schema = allocate(spec, config, schema, studies)
    losses = {}
    if config.sign_seeds > 1:
        transforms = {}
        for seed in range(config.seed, config.seed + config.sign_seeds):
            step(f"signs of seed {seed}")
            transforms[seed] = ModelTransform.of(spec, config.model_copy(update={"seed": seed}))
            losses[seed] = trial_loss(checkpoint, spec, schema, transforms[seed], studies, kept_back)
        transform = transforms[min(losses, key=lambda seed: losses[seed])]
    learned = None
    if config.learns_rotations:
        # Last, from the chosen signs. Clips and costs are those that the study found with Hadamard rotations.
        transform, learned = learn_rotations(checkpoint, spec, config, schema, transform, tokens, step)
    return Decisions(tokens, studies, schema, transform, losses, learned)


def _study(
    checkpoint: Checkpoint,
    spec: ModelSpec,
    config: ConvertConfig,
    schema: QuantizationSchema,
    transform: ModelTransform,
    tokens: torch.Tensor,
    step: Callable[[str], None],
) -> list[LayerStudy]:
    name = f"{spec.architecture.embedding}.weight"
    hidden = embed(tokens, checkpoint.load([name])[name], spec.embedding_scale)
    study = Study(LayerRunner(spec), spec, config, schema, transform, hidden)
    found = []
    for index in range(spec.layers):
        step(f"studying layer {index + 1} of {spec.layers}")
        found.append(study.layer(index, checkpoint.load_relative(spec.layer_prefix(index), spec.layer_tensors())))
    return found
