# SPDX-License-Identifier: Apache-2.0
"""The conversion: one part of the model at a time from the source's files to the output's.

First everything is decided that needs measuring (see decide/stages.py). Then, part by part, the
embedding, each decoder layer, the final norm with the head: read its tensors; fold norms, R1, R2, S
and R4 in float64; round; write its file. What is held in memory is one layer, the calibration's
hidden states, and once each the embedding and the head, which are transformed a slice of rows at a
time. Where several ranks convert, the first one writes; the others do their share of what is
measured and rounded.
"""

import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import torch

from smoothrot_offline import ranks
from smoothrot_offline.check.admit import admit
from smoothrot_offline.check.inspect import Sizes, measure, table_bytes
from smoothrot_offline.config import ConvertConfig, stays_tied
from smoothrot_offline.console import ProgressCallback, no_progress
from smoothrot_offline.decide.stages import Decisions, count_steps, decide
from smoothrot_offline.device import CPU, computing_on
from smoothrot_offline.distill.cost import distillation_steps
from smoothrot_offline.distill.distillation import distill
from smoothrot_offline.output.directory import ResumableDirectory
from smoothrot_offline.output.journal import Journal, conversion_identity
from smoothrot_offline.output.manifest import Manifest, read_manifest
from smoothrot_offline.output.model import Converter, describe_model, write_layers
from smoothrot_offline.rounding.sequential import SequentialRounding
from smoothrot_offline.source.checkpoint import DTYPES, open_checkpoint
from smoothrot_offline.source.layers import SourceModel
from smoothrot_vllm.format import QuantizationSchema


@dataclass(frozen=True)
class Conversion:
    """What a finished conversion did: its manifest, bytes, seconds, and how many layers it took
    from an interrupted run."""

    manifest: Manifest
    source_bytes: Sizes
    output_bytes: Sizes
    seconds: float
    resumed_layers: int | None

    def summary(self) -> dict[str, Any]:
        """The facts in one JSON-able object."""
        errors = [error for layer in self.manifest.layers for error in layer.weight_error.values()]
        return {
            "tensors": len(self.manifest.tensors),
            "source_bytes": self.source_bytes.model_dump(),
            "output_bytes": self.output_bytes.model_dump(),
            "ratio_total": self.source_bytes.total / self.output_bytes.total,
            "ratio_linears": self.source_bytes.linears / self.output_bytes.linears,
            "mean_weight_error": sum(errors) / len(errors),
            "calibration": (
                self.manifest.calibration.model_dump() if self.manifest.calibration else None
            ),
            "device": self.manifest.device,
            "seconds": round(self.seconds, 1),
            "resumed_layers": self.resumed_layers,
        }


@dataclass(frozen=True)
class _Begun:
    """What the first rank's journal has of an interrupted run."""

    done: bool
    decided: bool
    layers: int


def convert(
    source: Path,
    out: Path,
    config: ConvertConfig,
    progress: ProgressCallback = no_progress,
    workers: int = 1,
    device: torch.device = CPU,
) -> Conversion:
    """Convert the checkpoint in ``source`` into a new directory ``out``, which appears only when it
    is complete.

    Args:
        source, out, config: of the conversion.
        progress: told of every step.
        workers: processes that convert layers at the same time on the CPU; one layer is held in
            memory for each.
        device: where everything but reading and writing is computed.

    Raises:
        UnsupportedModelError: the architecture or one of its sizes cannot be converted.
        ConfigError: the options do not fit the model, or ``out`` is taken.
        CheckpointError: the source is damaged, or the output cannot be written.
        DeviceMemoryError: a GPU has too little memory.
    """
    started = time.monotonic()
    checkpoint = open_checkpoint(source).on(device)
    admitted = admit(checkpoint, config, workers, device)
    spec, beside = admitted.spec, admitted.side_files.copied
    steps = count_steps(spec, config) + spec.layers + 3 + distillation_steps(config)
    begun = count()

    def step(message: str) -> None:
        progress(message, next(begun), steps)

    if not ranks.first():
        with computing_on(device):
            ranks.check_alike(conversion_identity(checkpoint, beside, config, workers))
            _follow(SourceModel(checkpoint, spec), config, admitted.schema)
        return ranks.from_first(None)
    with ResumableDirectory(out) as directory, computing_on(device):
        step("source digests")
        identity = conversion_identity(checkpoint, beside, config, workers)
        ranks.check_alike(identity)
        journal = Journal(directory, identity, spec.layers + 2)
        resumed = len(journal.layers) if directory.resumed else None
        before = ranks.from_first(
            lambda: _Begun(journal.done, journal.decided, len(journal.layers))
        )
        if not journal.done:
            model = SourceModel(checkpoint, spec)
            decisions = _decisions(model, config, admitted.schema, before, journal, step)
            converter = _converter(model, config, decisions)
            step("embedding")
            if not journal.begun:
                journal.finish_part(journal.write_part(converter.embedding()))
            _layers(converter, decisions, config, workers, before, journal, step)
            step("head and files")
            head, head_error = converter.head()
            tensors = journal.tensors | journal.write_part(head)
            describe = partial(
                describe_model,
                directory,
                config,
                converter,
                decisions,
                side_files=beside,
                source_digests=identity["source"],
                layers=journal.layers,
                head_error=head_error,
            )
            describe(tensors=tensors)
            if config.distill_steps:
                if not journal.distilled:
                    # Text alone says nothing of what images or drafts pass through.
                    left = {*spec.parameters(), *spec.kept, *spec.added_to_draft()}
                    trained = {name: record for name, record in tensors.items() if name not in left}
                    with directory.openable() as rounded:
                        journal.finish_distillation(
                            *distill(rounded, source, config, trained, device, step)
                        )
                distillation, tensors = journal.apply_distillation(tensors)
                describe(tensors=tensors, distillation=distillation)
            directory.flush()
            journal.finish()
        journal.clear_work()
        manifest = read_manifest(directory.path)
        directory.commit()
    step("done")
    stored = {
        name: (tuple(record.shape), DTYPES[record.dtype])
        for name, record in manifest.tensors.items()
    }
    done = Conversion(
        manifest,
        source_bytes=measure(spec, checkpoint.stored_bytes(spec.source_tensors())),
        output_bytes=measure(spec, table_bytes(stored)),
        seconds=time.monotonic() - started,
        resumed_layers=resumed,
    )
    return ranks.from_first(lambda: done)


def _follow(model: SourceModel, config: ConvertConfig, schema: QuantizationSchema) -> None:
    """What every rank but the first does, in step with it."""
    before: _Begun = ranks.from_first(None)
    if before.done:
        return

    def step(_message: str) -> None:
        """The first one reports."""

    decisions = _decisions(model, config, schema, before, None, step)
    if config.rounding != "rtn":
        converter = _converter(model, config, decisions)
        _layers(converter, decisions, config, 1, before, None, step)


def _converter(model: SourceModel, config: ConvertConfig, decisions: Decisions) -> Converter:
    return Converter(
        model,
        decisions.schema,
        decisions.transform,
        decisions.studies,
        stays_tied(model.spec, config),
    )


def _decisions(
    model: SourceModel,
    config: ConvertConfig,
    schema: QuantizationSchema,
    before: _Begun,
    journal: Journal | None,
    step: Callable[[str], None],
) -> Decisions:
    """Everything that must be measured; of an interrupted run, what it has decided. The first rank
    has a journal."""
    if before.decided:
        for _ in range(count_steps(model.spec, config)):
            step("decided before")
    else:
        found = decide(model, config, schema, step)
        if found.tokens is None:
            return found
        if journal is not None:
            journal.finish_decisions(found)
        del found  # as large as what is read back
    # Read back in every run, so that an interrupted one goes on from the same bytes in the same
    # layout.
    return ranks.from_first(
        journal and partial(journal.load_decisions, model.spec, config, model.device)
    )


def _layers(
    converter: Converter,
    decisions: Decisions,
    config: ConvertConfig,
    workers: int,
    before: _Begun,
    journal: Journal | None,
    step: Callable[[str], None],
) -> None:
    """Convert the decoder layers that are not finished, in order. The first rank has a journal."""
    source = converter.source
    layers, finished = source.spec.layers, before.layers
    for index in range(finished):
        step(f"layer {index + 1} of {layers}, finished before")
    left = range(finished, layers)
    if workers > 1 and journal is not None:
        with closing(write_layers(converter, left, journal.folder, workers)) as written:
            for index in left:
                step(f"layer {index + 1} of {layers}")
                record, tensors = next(written)
                journal.finish_part(tensors, record)
        return
    rounding = None
    if config.rounding != "rtn":
        rounding = SequentialRounding(
            source,
            converter.schema,
            converter.embedded(ranks.share(decisions.calibration)),
            asymmetric=config.asymmetric,
            propagation=config.propagation if config.rounding == "gptaq" else 1.0,
            token_weights=[
                {linear: _share(own, decisions.calibration) for linear, own in weights.items()}
                for weights in decisions.token_weights
            ],
            qronos=config.rounding == "qronos",
            act_order=config.act_order,
            damping=config.damping,
        )
        if kept := ranks.from_first(journal and journal.load_hidden):
            own = {name: ranks.share(hidden).contiguous() for name, hidden in kept.items()}
            rounding.restore(source.checkpoint.placed(own))
    for index, loaded in source.layers(left):
        step(f"layer {index + 1} of {layers}")
        round_layer = None
        if rounding is not None:
            moments = decisions.output_moments[index] if decisions.output_moments else {}
            round_layer = partial(
                rounding.layer, output_moments=converter.output_moments(index, loaded, moments)
            )
        done = converter.layer(index, loaded, round_layer)
        state = {} if rounding is None else rounding.state()
        hidden = {name: ranks.gathered(own) for name, own in state.items()}
        if journal is not None:
            journal.finish_part(journal.write_part(done.tensors), done.record, hidden)


def _share(weights: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Of the weights of all ``tokens (samples, seqlen)``, those of this rank's, ``(tokens,)``."""
    return ranks.share(weights.view(tokens.shape)).flatten()
