# SPDX-License-Identifier: Apache-2.0
"""The analysis: one decoder layer at a time from the source's files, measured in the original
model.

For each layer: run it on one half of the calibration text and choose smoothing scales; run it on
the other half and measure every transform of every input. What is held in memory is one layer, the
hidden states of both halves, and a chunk of activations.
"""

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path

import torch

from smoothrot_offline.check.admit import admit_calibration, admit_model
from smoothrot_offline.config import ACTIVATION_CLIP, AnalysisConfig
from smoothrot_offline.console import ProgressCallback, no_progress
from smoothrot_offline.decide.policies import (
    InputStatistics,
    LayerError,
    Policy,
    PolicyOptions,
    SmoothingChoice,
    choose_scales,
)
from smoothrot_offline.decide.smoothing import NormStatistics
from smoothrot_offline.device import CPU, computing_on
from smoothrot_offline.output.directory import OutputDirectory
from smoothrot_offline.output.manifest import CalibrationRecord, package_versions
from smoothrot_offline.report import analysis as summary
from smoothrot_offline.report.analysis import (
    Analysis,
    InputRecord,
    LayerAnalysis,
    PeakRecord,
    PolicyRecord,
    TransformRecord,
)
from smoothrot_offline.report.measure import (
    BITS,
    DOWN,
    KINDS,
    MASSIVE_RATIO,
    TRANSFORMS,
    InputMeter,
    Measured,
    converted,
    layer_transforms,
)
from smoothrot_offline.report.pages import LayerPictures, analysis_page
from smoothrot_offline.source.checkpoint import open_checkpoint
from smoothrot_offline.source.family import ModelSpec
from smoothrot_offline.source.layers import LayerTensors, SourceModel, tokens_digest
from smoothrot_offline.source.text import load_calibration
from smoothrot_offline.transform.rotation import random_rotation
from smoothrot_offline.transform.sides import LayerScales, ModelTransform
from smoothrot_vllm.errors import ConfigError, UnsupportedModelError
from smoothrot_vllm.format import ActivationScheme, LinearScheme, WeightScheme
from smoothrot_vllm.hadamard import choose_block

JSON_NAME = "analysis.json"
PAGE_NAME = "report.html"

SCHEME = LinearScheme(
    weights=WeightScheme(bits=BITS),
    activations=ActivationScheme(bits=BITS, clip=ACTIVATION_CLIP[BITS]),
)
"""What the policies that try scales out assume of the conversion."""


def analyze(
    source: Path,
    out: Path,
    config: AnalysisConfig,
    progress: ProgressCallback = no_progress,
    device: torch.device = CPU,
) -> tuple[Analysis, list[Path]]:
    """Analyse the checkpoint in ``source`` into a new directory ``out``, which appears only when it
    is complete.

    Returns:
        What ``analysis.json`` holds, and the dead runs' leftovers that were removed.

    Raises:
        UnsupportedModelError: the architecture or one of its sizes is not one that converts.
        ConfigError: an option does not fit the model, ``out`` is taken, or matplotlib is not
            installed.
        CheckpointError: the source is damaged, or the output cannot be written.
        DeviceMemoryError: a GPU, if that is the ``device``, has too little memory.
    """
    checkpoint = open_checkpoint(source).on(device)
    spec = admit_model(checkpoint)
    if spec.experts:
        raise UnsupportedModelError(
            f"{source}: {spec.architecture.class_name} has experts; analyze measures dense models"
            " only. Convert the model as it is: the manifest records what the calibration found of"
            " each expert."
        )
    if spec.architecture.kinds:
        raise UnsupportedModelError(
            f"{source}: {spec.architecture.class_name} has layers of several kinds; analyze"
            " measures models whose layers are alike only. Convert the model as it is: the manifest"
            " records what the calibration found of each layer."
        )
    admit_calibration(checkpoint, spec, config.calib, config.calib_seqlen)
    chosen = _chosen_layers(spec, config)
    with OutputDirectory(out) as directory, computing_on(device):
        run = _Run(SourceModel(checkpoint, spec), config, chosen, progress)
        run.everything()
        found = run.result()
        directory.write_json(JSON_NAME, found.model_dump(mode="json"))
        directory.write_text(PAGE_NAME, analysis_page(found, run.pictures))
        directory.commit()
    progress("done", run.steps, run.steps)
    return found, directory.removed


@dataclass
class _Run:
    """The state of one analysis between its layers."""

    source: SourceModel
    config: AnalysisConfig
    chosen: tuple[int, ...]
    progress: ProgressCallback
    layers: list[LayerAnalysis] = field(default_factory=list)
    pictures: dict[int, LayerPictures] = field(default_factory=dict)

    @property
    def spec(self) -> ModelSpec:
        """The model's sizes and names."""
        return self.source.spec

    @property
    def steps(self) -> int:
        """Steps of the progress: the calibration text, the layers up to the last chosen one, and
        the pictures."""
        return self.chosen[-1] + 3

    def everything(self) -> None:
        """From the calibration text through the last chosen layer."""
        config = self.config
        self.progress("calibration text", 0, self.steps)
        # Scales are judged by text that they were not chosen from.
        self.tokens = load_calibration(
            config.calib,
            self.source.checkpoint.path,
            2 * config.calib_samples,
            config.calib_seqlen,
            config.seed,
            self.source.device,
        )
        hidden = self.source.embed(self.tokens)
        self._choosing, self._measuring = hidden.split(config.calib_samples)
        for index, loaded in self.source.layers(range(self.chosen[-1] + 1)):
            self.progress(f"layer {index + 1} of {self.chosen[-1] + 1}", index + 1, self.steps)
            self._layer(index, loaded)
        self.progress("pictures", self.steps - 1, self.steps)

    def result(self) -> Analysis:
        """The whole record."""
        file = Path(self.config.calib)
        return Analysis(
            model=self.source.checkpoint.path.resolve().name,
            architecture=self.spec.architecture.class_name,
            model_layers=self.spec.layers,
            # Without the place of a calibration file, as in a conversion's manifest.
            config=(
                self.config.model_copy(update={"calib": file.name})
                if file.is_file()
                else self.config
            ),
            packages=package_versions(),
            calibration=CalibrationRecord(
                samples=self.tokens.shape[0],
                seqlen=self.tokens.shape[1],
                tokens_sha256=tokens_digest(self.tokens),
            ),
            massive_ratio=MASSIVE_RATIO,
            massive={kind: summary.massive_activations(self.layers, kind) for kind in KINDS},
            mean_error={kind: summary.mean_errors(self.layers, kind) for kind in KINDS},
            error_difficulty_correlation={
                kind: summary.correlations(self.layers, kind) for kind in KINDS
            },
            policies={
                policy: summary.policy_summary(self.layers, policy)
                for policy in self.layers[0].policies
            },
            layers=self.layers,
        )

    def _layer(self, index: int, loaded: LayerTensors) -> None:
        layer = {name: tensor.double() for name, tensor in loaded.items()}
        folded = dict(layer)
        if self.spec.architecture.rotates_residual:
            ModelTransform.of_norms(self.spec).layer(index, folded, LayerScales())
        if index not in self.chosen:
            for hidden in (self._choosing, self._measuring):
                self.source.run(index, folded, hidden, {})
            return
        choices, norms = self._choices(index, layer, folded)
        scales = {policy: choice.scales for policy, choice in choices.items()}
        transforms = layer_transforms(self.spec, self.config.seed, index, layer, scales, norms)
        meters = {
            kind: InputMeter(
                transforms[kind],
                self.config.calib_seqlen,
                shown=tuple(name for name in TRANSFORMS if name in transforms[kind]),
                surfaces=kind == DOWN,
            )
            for kind in KINDS
        }
        groups = dict(zip(KINDS, self.spec.architecture.input_groups(), strict=True))
        self.source.run(
            index, folded, self._measuring, {groups[kind][0]: meters[kind].update for kind in KINDS}
        )
        results = {kind: meters[kind].results() for kind in KINDS}
        self.layers.append(
            LayerAnalysis(
                index=index,
                inputs={
                    kind: self._input(groups[kind], meters[kind], results[kind]) for kind in KINDS
                },
                policies={policy: _policy(choices, policy, results[DOWN]) for policy in choices},
            )
        )
        learned = choices.get("learned")
        self.pictures[index] = LayerPictures(
            surfaces=meters[DOWN].surfaces,
            shape=(self.config.calib_seqlen, self.spec.intermediate),
            learned=learned.scales.cpu() if learned else None,
            start=learned.start.cpu() if learned and learned.start is not None else None,
        )

    def _choices(
        self, index: int, layer: dict[str, torch.Tensor], folded: dict[str, torch.Tensor]
    ) -> tuple[dict[Policy, SmoothingChoice], dict[str, torch.Tensor]]:
        """Scales by policy, max first, and those of the norms."""
        down = self.spec.architecture.down
        tokens = self.config.calib_samples * self.config.calib_seqlen
        statistics = InputStatistics(self.spec.intermediate, tokens, self.source.device)
        residual = (
            random_rotation(self.spec.hidden, self.config.seed)
            if self.spec.architecture.rotates_residual
            else None
        )
        norms = NormStatistics(self.spec, self.spec.layer_table(index), residual, layer)
        self.source.run(
            index, folded, self._choosing, {down: statistics.update, **norms.observers()}
        )
        block = choose_block(self.spec.intermediate).size
        error = LayerError(statistics.sample, layer[f"{down}.weight"].float(), SCHEME, block)
        policies: list[Policy] = [
            "max",
            *(policy for policy in self.config.policies if policy != "max"),
        ]
        choices = {
            policy: choose_scales(policy, statistics, error, PolicyOptions()) for policy in policies
        }
        return choices, norms.scales(layer, torch.float64)

    def _input(
        self, linears: tuple[str, ...], meter: InputMeter, results: dict[str, Measured]
    ) -> InputRecord:
        peak = meter.peak
        assert peak is not None
        sequences = self.tokens[self.config.calib_samples :]
        return InputRecord(
            linears=list(linears),
            peak=PeakRecord(
                **dataclasses.asdict(peak),
                token=int(sequences[peak.sample, peak.position]),
                ratio=summary.ratio(peak.magnitude, peak.median),
            ),
            massive_tokens=len(meter.massive),
            massive_positions=sorted({position for _, position in meter.massive}),
            transforms={
                name: TransformRecord(
                    **dataclasses.asdict(results[name]), peak_token_bins=meter.peak_token_bins[name]
                )
                for name in TRANSFORMS
                if name in results
            },
        )


def _policy(
    choices: dict[Policy, SmoothingChoice], policy: Policy, results: dict[str, Measured]
) -> PolicyRecord:
    choice, plain, as_converted = choices[policy], results[policy], results[converted(policy)]
    return PolicyRecord(
        statistic=choice.statistic,
        alpha=choice.alpha,
        quantile=choice.quantile,
        scale_min=float(choice.scales.min()),
        scale_max=float(choice.scales.max()),
        scale_geometric_mean=float(choice.scales.log().mean().exp()),
        error=plain.error,
        relative_error=plain.relative_error,
        ratio_to_max=summary.ratio(plain.error, results["max"].error),
        converted_error=as_converted.error,
        converted_ratio_to_max=summary.ratio(as_converted.error, results[converted("max")].error),
        selected=not torch.equal(choice.scales, choices["max"].scales),
    )


def _chosen_layers(spec: ModelSpec, config: AnalysisConfig) -> tuple[int, ...]:
    chosen = (
        tuple(range(spec.layers)) if config.layers is None else tuple(sorted(set(config.layers)))
    )
    if not chosen or chosen[0] < 0 or chosen[-1] >= spec.layers:
        raise ConfigError(
            f"--layers {','.join(map(str, chosen))}: expected layers of this model, 0 to"
            f" {spec.layers - 1}. Choose others."
        )
    return chosen
