# SPDX-License-Identifier: Apache-2.0
"""Everything a conversion decides by measurement before it writes, stage by stage: calibration
text, what errors cost, scales with clips and 8-bit layers, signs, the norms' scales, learned
rotations and scales.

Each stage says how many steps it reports, what it costs, and does it.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Protocol

import torch

from smoothrot_offline import ranks
from smoothrot_offline.config import ConvertConfig, folds_residual
from smoothrot_offline.decide.policies import policy_flop
from smoothrot_offline.decide.signs import trial_loss
from smoothrot_offline.decide.smoothing import norm_samples, smooth_norms, storable_scales
from smoothrot_offline.decide.study import PROBE_SAMPLES, LayerStudy, Study, allocate
from smoothrot_offline.learn.fisher import gradient_steps, gradients_flop, model_gradients
from smoothrot_offline.learn.folds import Folded
from smoothrot_offline.learn.learning import learn_folds, learning_flop, learning_steps
from smoothrot_offline.output.manifest import LearnedRecord
from smoothrot_offline.source.family import ModelSpec
from smoothrot_offline.source.layers import SourceModel
from smoothrot_offline.source.text import GENERATED, GENERATING_PASSES, load_calibration
from smoothrot_offline.transform.sides import LayerScales, ModelTransform
from smoothrot_vllm.format import QuantizationSchema

_log = logging.getLogger(__name__)

HELD_OUT_SAMPLES = 8
"""Calibration sequences that judge signs and what is learned."""

Step = Callable[[str], None]
"""Told what begins."""


@dataclass
class Decisions:
    """What the measurements led to.

    ``tokens`` are the calibration tokens int64 ``(samples, seqlen)``, None if the model is not run,
    ``held_out`` more of them; ``studies`` has one entry for each layer; ``schema`` carries the
    overrides; ``transform`` the chosen signs and learned rotations; ``sign_losses`` the held-out
    loss of each seed tried, in nats; ``learned`` what learning led to, if there was any.
    ``output_gradients``, of this rank's sequences, ``token_weights`` and ``output_moments`` are
    those of :class:`~smoothrot_offline.learn.fisher.Gradients`, for the study and for the rounding;
    empty if that does not ask for them.
    """

    tokens: torch.Tensor | None
    studies: list[LayerStudy]
    schema: QuantizationSchema
    transform: ModelTransform
    sign_losses: dict[int, float] = field(default_factory=dict)
    learned: LearnedRecord | None = None
    held_out: torch.Tensor | None = None
    output_gradients: list[torch.Tensor] = field(default_factory=list)
    token_weights: list[dict[str, torch.Tensor]] = field(default_factory=list)
    output_moments: list[dict[str, torch.Tensor]] = field(default_factory=list)

    @property
    def calibration(self) -> torch.Tensor:
        """``tokens``, where there must be some."""
        assert self.tokens is not None
        return self.tokens


@dataclass(frozen=True)
class Cost:
    """Of a stage: how often it folds all weights, floating-point operations, and passes of all
    calibration tokens through the model."""

    folds: int = 0
    flop: float = 0.0
    passes: float = 0.0


class Stage(Protocol):
    """A measurement and what follows from it. A stage with no steps is not run and costs
    nothing."""

    def steps(self, spec: ModelSpec, config: ConvertConfig) -> int:
        """How often :meth:`run` reports progress."""
        ...

    def cost(self, spec: ModelSpec, config: ConvertConfig) -> Cost:
        """What :meth:`run` costs."""
        ...

    def run(self, source: SourceModel, config: ConvertConfig, found: Decisions, step: Step) -> None:
        """Measure, and add to ``found``."""
        ...


class CalibrationText:
    """Tokens from a file, from the model itself or from a hub data set."""

    def steps(self, spec: ModelSpec, config: ConvertConfig) -> int:
        """One, whether or not there is anything to measure."""
        return 1

    def cost(self, spec: ModelSpec, config: ConvertConfig) -> Cost:
        """What generating takes."""
        generated = config.needs_calibration and config.calib == GENERATED
        return Cost(passes=GENERATING_PASSES if generated else 0)

    def run(self, source: SourceModel, config: ConvertConfig, found: Decisions, step: Step) -> None:
        """Load them, and keep some back to judge by."""
        step("calibration text" if config.needs_calibration else "starting")
        if not config.needs_calibration:
            return
        held_out = HELD_OUT_SAMPLES if config.sign_seeds > 1 or config.learns_rotations else 0
        load = partial(
            load_calibration,
            config.calib,
            source.checkpoint.path,
            config.calib_samples,
            config.calib_seqlen,
            config.seed,
            source.device,
            held_out,
        )
        tokens = ranks.from_first(load)
        found.tokens, found.held_out = tokens.tensor_split([config.calib_samples])


class LossGradients:
    """What errors cost the whole model, for the 8-bit layers and for the rounding."""

    def steps(self, spec: ModelSpec, config: ConvertConfig) -> int:
        """One for every few sequences."""
        return gradient_steps(self._sequences(config))

    def cost(self, spec: ModelSpec, config: ConvertConfig) -> Cost:
        """The way there and back."""
        tokens = self._sequences(config) * config.calib_seqlen
        per_token = gradients_flop(spec, config.calib_seqlen, config.relates_outputs)
        return Cost(flop=tokens * per_token)

    def run(self, source: SourceModel, config: ConvertConfig, found: Decisions, step: Step) -> None:
        """Take them."""
        tokens = found.calibration[: self._sequences(config)]
        outputs = PROBE_SAMPLES if config.keep_8bit else 0
        gradients = model_gradients(
            source,
            tokens,
            config.seed,
            step,
            outputs=outputs,
            linears=config.weighs_tokens,
            moments=config.relates_outputs,
        )
        found.output_gradients = gradients.outputs
        if config.weighs_tokens:
            found.token_weights = gradients.weights
            found.output_moments = gradients.moments

    @staticmethod
    def _sequences(config: ConvertConfig) -> int:
        if config.weighs_tokens:
            return config.calib_samples
        return min(config.calib_samples, PROBE_SAMPLES) if config.keep_8bit else 0


class StudyOfLayers:
    """Smoothing scales, clips, and which linears keep 8 bits."""

    def steps(self, spec: ModelSpec, config: ConvertConfig) -> int:
        """One for each layer."""
        return spec.layers if config.scales != "none" or config.needs_probe else 0

    def cost(self, spec: ModelSpec, config: ConvertConfig) -> Cost:
        """The layers once, the trials of the scales, and the probe's passes."""
        flop, passes = 0.0, 0.0
        if config.scales != "none":
            passes = 1.0
            tokens = config.calib_samples * config.calib_seqlen
            flop += policy_flop(spec, config.scales, tokens)
        if config.needs_probe:
            probe = min(config.calib_samples, PROBE_SAMPLES) * config.calib_seqlen
            flop += (6 if config.keep_8bit else 2) * probe * spec.token_flop(config.calib_seqlen)
        return Cost(folds=int(config.needs_probe), flop=flop, passes=passes)

    def run(self, source: SourceModel, config: ConvertConfig, found: Decisions, step: Step) -> None:
        """Study each layer, then decide for all of them together."""
        study = Study(
            source,
            config,
            found.schema,
            found.transform,
            found.calibration,
            found.output_gradients,
        )
        found.studies = []
        for index, loaded in source.layers():
            step(f"studying layer {index + 1} of {source.spec.layers}")
            found.studies.append(study.layer(index, loaded))
        _warn_of_unseen_experts(found.studies)
        found.schema = allocate(source.spec, config, found.schema, found.studies)
        found.output_gradients = []


class Signs:
    """The random signs whose converted model predicts held-out text best."""

    def steps(self, spec: ModelSpec, config: ConvertConfig) -> int:
        """One for each seed, if there are several."""
        return config.sign_seeds if config.sign_seeds > 1 else 0

    def cost(self, spec: ModelSpec, config: ConvertConfig) -> Cost:
        """For each seed a fold, and the held-out text through the model and its head."""
        head = 2 * spec.vocab * spec.hidden
        tokens = config.sign_seeds * HELD_OUT_SAMPLES * config.calib_seqlen
        return Cost(
            folds=config.sign_seeds, flop=tokens * (spec.token_flop(config.calib_seqlen) + head)
        )

    def run(self, source: SourceModel, config: ConvertConfig, found: Decisions, step: Step) -> None:
        """Try each seed, with the study's scales of down_proj: those of the norms belong to the
        rotation by its own seed."""
        assert found.held_out is not None
        plain = [replace(study, scales=replace(study.scales, norms={})) for study in found.studies]
        transforms = {}
        for seed in range(config.seed, config.seed + config.sign_seeds):
            step(f"signs of seed {seed}")
            transforms[seed] = ModelTransform.of(
                source.spec, config.model_copy(update={"seed": seed})
            )
            found.sign_losses[seed] = trial_loss(
                source, found.schema, transforms[seed], plain, found.held_out
            )
        found.transform = transforms[min(transforms, key=lambda seed: found.sign_losses[seed])]


class Norms:
    """The norms' scales once more, where R1 was chosen after the study, which smoothed behind
    another one."""

    def steps(self, spec: ModelSpec, config: ConvertConfig) -> int:
        """One for each layer."""
        again = config.smooths_norms and config.sign_seeds > 1
        return spec.layers if again and folds_residual(spec, config) else 0

    def cost(self, spec: ModelSpec, config: ConvertConfig) -> Cost:
        """A pass of some of the sequences."""
        tokens = norm_samples(config.calib_samples) * config.calib_seqlen
        return Cost(flop=tokens * spec.token_flop(config.calib_seqlen))

    def run(self, source: SourceModel, config: ConvertConfig, found: Decisions, step: Step) -> None:
        """Measure behind the R1 that will be folded."""
        norms = smooth_norms(source, found.transform.residual, found.calibration, step)
        found.studies = [
            replace(study, scales=replace(study.scales, norms=own))
            for study, own in zip(found.studies, norms, strict=True)
        ]


class Rotations:
    """R1, R2 and S learned, from the chosen signs and the study's scales. Clips and costs stay
    those that the study found."""

    def steps(self, spec: ModelSpec, config: ConvertConfig) -> int:
        """Those of :func:`learn_folds`."""
        return learning_steps(config) if config.learns_rotations else 0

    def cost(self, spec: ModelSpec, config: ConvertConfig) -> Cost:
        """The descent, and the original's predictions."""
        return Cost(flop=learning_flop(spec, config), passes=1)

    def run(self, source: SourceModel, config: ConvertConfig, found: Decisions, step: Step) -> None:
        """Learn them."""
        assert found.held_out is not None
        start = Folded(found.transform, [study.scales for study in found.studies])
        learned = learn_folds(
            source, config, found.schema, start, found.calibration, found.held_out, step
        )
        found.transform, found.learned = learned.transform, learned.record
        found.studies = [
            replace(study, scales=_storable(source, config, index, scales))
            for index, (study, scales) in enumerate(zip(found.studies, learned.scales, strict=True))
        ]


def _storable(
    source: SourceModel, config: ConvertConfig, index: int, scales: LayerScales
) -> LayerScales:
    """The scales of a layer with those of norms that can be stored exactly."""
    table, prefix = source.spec.layer_table(index), source.spec.layer_prefix(index)
    norms = {}
    for norm, wanted in scales.norms.items():
        gamma = torch.ones_like(wanted)
        if not folds_residual(source.spec, config):
            gamma = source.tensor(f"{prefix}{norm}.weight").double() + table.norm_offset
        norms[norm] = storable_scales(wanted, gamma, table.norm_offset, source.dtype)
    return replace(scales, norms=norms)


STAGES: tuple[Stage, ...] = (
    CalibrationText(),
    LossGradients(),
    StudyOfLayers(),
    Signs(),
    Norms(),
    Rotations(),
)


def count_steps(spec: ModelSpec, config: ConvertConfig) -> int:
    """How often :func:`decide` reports progress."""
    return sum(stage.steps(spec, config) for stage in STAGES)


def decide(
    source: SourceModel, config: ConvertConfig, schema: QuantizationSchema, step: Step
) -> Decisions:
    """Run the stages that a configuration asks for.

    Args:
        source, config: of the conversion.
        schema: the bits and groups asked for.
        step: told what begins, ``count_steps`` times.

    Raises:
        ConfigError: the calibration text cannot be had.
        CheckpointError: the model's activations are not finite.
    """
    transform = ModelTransform.of(source.spec, config)
    found = Decisions(None, [LayerStudy()] * source.spec.layers, schema, transform)
    for stage in STAGES:
        if stage.steps(source.spec, config):
            stage.run(source, config, found, step)
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
