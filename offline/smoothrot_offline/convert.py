# SPDX-License-Identifier: Apache-2.0
"""The conversion: one decoder layer at a time from the source's files to the output's shards.

First everything is decided that needs measuring (see decide.py). Then, for each layer: read its
tensors; fold norms, R1, R2, S and R4 in float64; round; hand the result to the shard writer. What
is held in memory is one layer, the calibration's hidden states, the shard being filled, and once
each the embedding and the head, which are transformed a slice of rows at a time.
"""

import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from smoothrot_offline.check.admit import admit
from smoothrot_offline.check.inspect import Sizes, header_table, measure
from smoothrot_offline.config import MEBIBYTE, ConvertConfig, stays_tied
from smoothrot_offline.console import ProgressCallback, no_progress
from smoothrot_offline.decide.stages import (
    Decisions,
    count_steps,
    decide,
    pack_decisions,
    unpack_decisions,
)
from smoothrot_offline.device import CPU, computing_on, device_kind
from smoothrot_offline.output.directory import ResumableDirectory, ShardWriter
from smoothrot_offline.output.journal import Journal, conversion_identity
from smoothrot_offline.output.layers import LayerConverter, cast, cast_rows, convert_layers, store
from smoothrot_offline.output.manifest import (
    CalibrationRecord,
    Manifest,
    RotationRecord,
    SourceRecord,
    package_versions,
    read_manifest,
)
from smoothrot_offline.rounding.rtn import quantize_rtn
from smoothrot_offline.rounding.sequential import SequentialRounding
from smoothrot_offline.source.checkpoint import (
    DTYPES,
    Checkpoint,
    file_digest,
    open_checkpoint,
    source_dtype,
)
from smoothrot_offline.source.family import ModelSpec
from smoothrot_offline.source.headers import CONFIG_NAME
from smoothrot_offline.source.layers import (
    LayerRunner,
    LayerTensors,
    embed,
    layers_ahead,
    tokens_digest,
)
from smoothrot_offline.transform.record import transform_tensors
from smoothrot_vllm.format import (
    MANIFEST_NAME,
    TRANSFORM_NAME,
    TRANSFORMERS_WEIGHTS,
    QuantizationSchema,
)
from smoothrot_vllm.hadamard import choose_block

HEAD_ROWS = 4096
"""Rows of the embedding and of the head that are held in float64 at a time."""


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
    with ResumableDirectory(out) as directory, computing_on(device):
        steps = count_steps(spec, config) + spec.layers + 3
        progress("source digests", 0, steps)
        identity = conversion_identity(checkpoint, beside, config, workers)
        journal = Journal(directory, identity)
        resumed = len(journal.layers) if directory.resumed else None
        if not journal.done:
            shards = ShardWriter(
                directory, config.shard_mib * MEBIBYTE, journal.shards, journal.finish_shard
            )
            run = _Run(
                checkpoint,
                spec,
                config,
                admitted.schema,
                beside,
                identity["source"],
                journal,
                shards,
                progress,
                steps,
                workers,
            )
            run.everything()
            run.finish(directory)
            directory.flush()
            journal.finish()
        journal.clear_work()
        manifest = read_manifest(directory.path)
        directory.commit()
    progress("done", steps, steps)
    stored = {
        name: (tuple(record.shape), DTYPES[record.dtype])
        for name, record in manifest.tensors.items()
    }
    return Conversion(
        manifest,
        source_bytes=measure(spec, header_table(checkpoint, spec.source_tensors())),
        output_bytes=measure(spec, stored),
        seconds=time.monotonic() - started,
        resumed_layers=resumed,
    )


@dataclass
class _Run:
    """The state of one conversion between its stages."""

    checkpoint: Checkpoint
    spec: ModelSpec
    config: ConvertConfig
    schema: QuantizationSchema
    side_files: list[Path]
    source_digests: dict[str, str]
    journal: Journal
    shards: ShardWriter
    progress: ProgressCallback
    steps: int
    workers: int
    head_error: float | None = None

    def __post_init__(self) -> None:
        self.embedding = f"{self.spec.architecture.embedding}.weight"
        self.dtype = source_dtype(self.checkpoint, self.embedding)

    def everything(self) -> None:
        """From the embedding to the head, in the order the model computes."""
        steps = iter(range(1, self.steps))  # the first was the digests

        def step(message: str) -> None:
            self.progress(message, next(steps), self.steps)

        self.decisions = self._decide(step)
        self.schema, self.transform = self.decisions.schema, self.decisions.transform
        step("embedding")
        hidden = self._embedding(self.decisions.tokens)
        rounding = self._rounding(hidden)
        for index in range(len(self.journal.layers)):
            step(f"layer {index + 1} of {self.spec.layers}, finished before")
            self.shards.add(self.journal.load_layer(index))
        self._layers(range(len(self.journal.layers), self.spec.layers), rounding, step)
        step("head and files")
        self._head()

    def _decide(self, step: Callable[[str], None]) -> Decisions:
        if self.journal.decisions is None:
            found = decide(self.checkpoint, self.spec, self.config, self.schema, step)
            if found.tokens is None:
                return found
            self.journal.finish_decisions(*pack_decisions(found))
        else:
            for _ in range(count_steps(self.spec, self.config)):
                step("decided before")
        # Read back in every run, so that an interrupted one goes on from the same bytes in the same
        # layout.
        assert self.journal.decisions is not None
        tensors = self.checkpoint.placed(self.journal.load_decisions())
        return unpack_decisions(
            self.journal.decisions["decisions"], tensors, self.spec, self.config
        )

    def finish(self, directory: ResumableDirectory) -> None:
        """Write everything that is no tensor; the configuration makes the directory a model, the
        manifest comes last."""
        self.shards.finish()
        for file in self.side_files:
            directory.copy(self.checkpoint.path, file)
        config = {key: value for key, value in self.checkpoint.config.items() if key != "auto_map"}
        # transformers writes dtype today and torch_dtype in former years; readers of either must
        # find the same.
        for key in [key for key in ("dtype", "torch_dtype") if key in config] or ["dtype"]:
            config[key] = str(self.dtype).removeprefix("torch.")
        config["tie_word_embeddings"] = stays_tied(self.spec, self.config)
        config["transformers_weights"] = TRANSFORMERS_WEIGHTS
        directory.write_tensors(
            TRANSFORM_NAME,
            transform_tensors(self.checkpoint, self.transform, self.decisions.studies),
        )
        digest = file_digest(directory.path / TRANSFORM_NAME)
        config["quantization_config"] = self.schema.model_copy(
            update={"transform_sha256": digest}
        ).model_dump(mode="json")
        directory.write_json(CONFIG_NAME, config)
        names = [CONFIG_NAME, *self.checkpoint.files]
        (directory.path / MANIFEST_NAME).unlink(missing_ok=True)
        manifest = Manifest(
            config=self._recorded_config(),
            source=SourceRecord(
                model_type=self.spec.architecture.model_type,
                tied=self.spec.tied,
                files={name: self.source_digests[name] for name in names},
            ),
            packages=package_versions(),
            calibration=self._calibration(),
            rotations=self._rotations(),
            device=device_kind(self.checkpoint.device),
            layers=self.journal.layers,
            lm_head_weight_error=self.head_error,
            tensors=self.shards.records,
            files=directory.digests(),
        )
        directory.write_json(MANIFEST_NAME, manifest.model_dump(mode="json"))

    def _calibration(self) -> CalibrationRecord | None:
        tokens = self.decisions.tokens
        if tokens is None:
            return None
        return CalibrationRecord(
            samples=tokens.shape[0], seqlen=tokens.shape[1], tokens_sha256=tokens_digest(tokens)
        )

    def _embedding(self, tokens: torch.Tensor | None) -> torch.Tensor | None:
        embedding = self.checkpoint.load([self.embedding])[self.embedding]
        slices = (self.transform.embedding(part.double()) for part in embedding.split(HEAD_ROWS))
        self.shards.add(
            {self.embedding: cast_rows(slices, embedding.shape, self.dtype, self.embedding)}
        )
        return None if tokens is None else embed(tokens, embedding, self.spec.embedding_scale)

    def _rounding(self, hidden: torch.Tensor | None) -> SequentialRounding | None:
        if self.config.rounding == "rtn" or hidden is None:
            return None
        rounding = SequentialRounding(
            LayerRunner(self.spec),
            self.spec,
            self.schema,
            torch.cat(
                [
                    cast(
                        self.transform.embedding(part.double()), self.dtype, self.embedding
                    ).float()
                    for part in hidden.split(1)
                ]
            ),
            asymmetric=self.config.rounding == "gptaq",
            propagation=self.config.propagation,
            act_order=self.config.act_order,
            damping=self.config.damping,
        )
        if kept := self.journal.load_hidden():
            rounding.restore(self.checkpoint.placed(kept))
        return rounding

    def _layers(
        self, indices: range, rounding: SequentialRounding | None, step: Callable[[str], None]
    ) -> None:
        converter = LayerConverter(
            self.checkpoint,
            self.spec,
            self.schema,
            self.transform,
            self.decisions.studies,
            self.dtype,
        )
        if self.workers > 1:
            with closing(
                convert_layers(converter, indices, self.journal.folder, self.workers)
            ) as kept:
                for index in indices:
                    step(f"layer {index + 1} of {self.spec.layers}")
                    layer = next(kept)
                    self.journal.adopt_layer(layer.record, layer.names, layer.file)
                    self.shards.add(self.journal.load_layer(index))
            return
        for index, loaded in zip(
            indices, layers_ahead(self.checkpoint, self.spec, indices), strict=True
        ):
            step(f"layer {index + 1} of {self.spec.layers}")
            self._finish_layer(index, loaded, converter, rounding)
            # From its file: what waits for its shard for many layers would lie in between the large
            # tensors of each, and keep the allocator from using their place again.
            self.shards.add(self.journal.load_layer(index))

    def _finish_layer(
        self,
        index: int,
        loaded: LayerTensors,
        converter: LayerConverter,
        rounding: SequentialRounding | None,
    ) -> None:
        done = converter.layer(index, loaded, None if rounding is None else rounding.layer)
        self.journal.finish_layer(
            index, done.record, done.tensors, {} if rounding is None else rounding.state()
        )

    def _head(self) -> None:
        table = self.spec.architecture
        norm, head = f"{table.final_norm}.weight", f"{table.lm_head}.weight"
        gamma = self.checkpoint.load([norm])[norm].double()
        self.shards.add({norm: cast(self.transform.final_norm(gamma), self.dtype, norm)})
        source = self.embedding if self.spec.tied else head
        weight = self.checkpoint.load([source])[source]
        if stays_tied(self.spec, self.config):
            return
        slices = (self.transform.head(part.double(), gamma) for part in weight.split(HEAD_ROWS))
        scheme = self.schema.scheme(table.lm_head)
        if scheme is None:
            self.shards.add({head: cast_rows(slices, weight.shape, self.dtype, head)})
        else:
            parts = ((part, quantize_rtn(part, scheme.weights, head)) for part in slices)
            stored, self.head_error = store(parts, weight.shape, scheme.weights, table.lm_head)
            self.shards.add(stored)

    def _recorded_config(self) -> ConvertConfig:
        """The options without the place of a calibration file, which would make the same
        conversion differ by machine."""
        file = Path(self.config.calib)
        return (
            self.config.model_copy(update={"calib": file.name}) if file.is_file() else self.config
        )

    def _rotations(self) -> RotationRecord | None:
        online = self.transform.online
        if online.down_proj is None:
            return None
        return RotationRecord(
            r1=choose_block(self.spec.hidden).size,
            r2=choose_block(self.spec.head_dim).size,
            r4=online.down_proj.block,
            seed=self.transform.seed,
            sign_losses=self.decisions.sign_losses,
            learned=self.decisions.learned,
        )
