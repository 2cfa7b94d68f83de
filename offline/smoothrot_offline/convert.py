# SPDX-License-Identifier: Apache-2.0
"""The conversion: one part of the model at a time from the source's files to the output's.

First everything is decided that needs measuring (see decide/stages.py). Then, part by part, the
embedding, each decoder layer, the final norm with the head: read its tensors; fold norms, R1, R2, S
and R4 in float64; round; write its file. What is held in memory is one layer, the calibration's
hidden states, and once each the embedding and the head, which are transformed a slice of rows at a
time.
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

    with ResumableDirectory(out) as directory, computing_on(device):
        step("source digests")
        identity = conversion_identity(checkpoint, beside, config, workers)
        journal = Journal(directory, identity, spec.layers + 2)
        resumed = len(journal.layers) if directory.resumed else None
        if not journal.done:
            model = SourceModel(checkpoint, spec)
            decisions = _decisions(model, config, admitted.schema, journal, step)
            converter = Converter(
                model,
                decisions.schema,
                decisions.transform,
                decisions.studies,
                stays_tied(spec, config),
            )
            step("embedding")
            if not journal.begun:
                journal.finish_part(journal.write_part(converter.embedding()))
            _layers(converter, decisions, config, workers, journal, step)
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
    return Conversion(
        manifest,
        source_bytes=measure(spec, checkpoint.stored_bytes(spec.source_tensors())),
        output_bytes=measure(spec, table_bytes(stored)),
        seconds=time.monotonic() - started,
        resumed_layers=resumed,
    )


def _decisions(
    model: SourceModel,
    config: ConvertConfig,
    schema: QuantizationSchema,
    journal: Journal,
    step: Callable[[str], None],
) -> Decisions:
    """Everything that must be measured; of an interrupted run, what it has decided."""
    if journal.decided:
        for _ in range(count_steps(model.spec, config)):
            step("decided before")
    else:
        found = decide(model, config, schema, step)
        if found.tokens is None:
            return found
        journal.finish_decisions(found)
    # Read back in every run, so that an interrupted one goes on from the same bytes in the same
    # layout.
    return journal.load_decisions(model.spec, config, model.device)


def _layers(
    converter: Converter,
    decisions: Decisions,
    config: ConvertConfig,
    workers: int,
    journal: Journal,
    step: Callable[[str], None],
) -> None:
    """Convert the decoder layers that are not finished, in order."""
    source = converter.source
    layers, finished = source.spec.layers, len(journal.layers)
    for index in range(finished):
        step(f"layer {index + 1} of {layers}, finished before")
    left = range(finished, layers)
    if workers > 1:
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
            converter.embedded(decisions.calibration),
            asymmetric=config.asymmetric,
            propagation=config.propagation if config.rounding == "gptaq" else 1.0,
            token_weights=decisions.token_weights,
            qronos=config.rounding == "qronos",
            act_order=config.act_order,
            damping=config.damping,
        )
        if kept := journal.load_hidden():
            rounding.restore(source.checkpoint.placed(kept))
    for index, loaded in source.layers(left):
        step(f"layer {index + 1} of {layers}")
        done = converter.layer(index, loaded, None if rounding is None else rounding.layer)
        hidden = None if rounding is None else rounding.state()
        journal.finish_part(journal.write_part(done.tensors), done.record, hidden)
