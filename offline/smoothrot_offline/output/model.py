# SPDX-License-Identifier: Apache-2.0
"""What a conversion writes of a model: its parts, each read, folded, rounded and packed, in order
or by several processes at once; then everything beside the weights."""

import os
import pickle
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import connection, get_context, parent_process
from pathlib import Path
from typing import Any

import torch

from smoothrot_offline.config import ConvertConfig
from smoothrot_offline.decide.stages import Decisions
from smoothrot_offline.decide.study import LayerStudy
from smoothrot_offline.device import device_kind
from smoothrot_offline.output.directory import ResumableDirectory, write_index, write_part
from smoothrot_offline.output.manifest import (
    CalibrationRecord,
    DistillationRecord,
    LayerRecord,
    Manifest,
    RotationRecord,
    ScaleRange,
    SourceRecord,
    TensorRecord,
    package_versions,
)
from smoothrot_offline.rounding.rtn import HEAD_ROWS, QuantizedWeight, quantize_rtn, store
from smoothrot_offline.source.checkpoint import file_digest
from smoothrot_offline.source.headers import CONFIG_NAME
from smoothrot_offline.source.layers import LayerTensors, SourceModel, tokens_digest
from smoothrot_offline.source.settings import server_keys
from smoothrot_offline.transform.draft import EMBEDDING_NORM, FUSION, transform_own_head
from smoothrot_offline.transform.record import transform_tensors
from smoothrot_offline.transform.sides import ModelTransform
from smoothrot_vllm.errors import CheckpointError, OutputError
from smoothrot_vllm.format import (
    MANIFEST_NAME,
    TRANSFORM_NAME,
    TRANSFORMERS_WEIGHTS,
    QuantizationSchema,
)
from smoothrot_vllm.hadamard import choose_block

RoundLayer = Callable[[int, dict[str, torch.Tensor]], dict[str, QuantizedWeight]]
"""Rounds the linears of a transformed layer otherwise than to nearest: see
``SequentialRounding.layer``."""


@dataclass(frozen=True)
class FinishedLayer:
    """A layer's entry in the manifest, and its stored tensors by full name."""

    record: LayerRecord
    tensors: dict[str, torch.Tensor]


@dataclass(frozen=True)
class Converter:
    """Converts the parts of one model, each by itself.

    ``schema`` has the bits of every linear, ``studies`` what was found of each layer; ``tied`` says
    that the output has no head beside the embedding.
    """

    source: SourceModel
    schema: QuantizationSchema
    transform: ModelTransform
    studies: Sequence[LayerStudy]
    tied: bool

    def embedding(self) -> dict[str, torch.Tensor]:
        """What is stored of all that the first layer reads, by its full name: the embedding, and
        what is beside a text tower, a draft head too."""
        name = self.source.embedding_name
        rows = self.source.tensor(name)
        slices = (self.transform.embedding(part.double()) for part in rows.split(HEAD_ROWS))
        stored = {name: _cast_rows(slices, rows.shape, self.source.dtype, name)}
        for kept in self.source.spec.kept:
            tensor = self.transform.beside(kept, self.source.tensor(kept))
            stored[kept] = cast(tensor, self.source.dtype, kept)
        if (head := self.source.spec.draft) is not None and self.schema.online.readers is None:
            changed = transform_own_head(
                self.transform,
                self.source.tensor(self.source.norm_name).double(),
                {
                    name: self.source.tensor(f"{head.module}.{name}").double()
                    for name in (FUSION, EMBEDDING_NORM)
                },
            )
            for name, tensor in changed.items():
                full = f"{head.module}.{name}"
                stored[full] = cast(tensor, self.source.dtype, full).contiguous()
        return stored

    def embedded(self, tokens: torch.Tensor) -> torch.Tensor:
        """What the converted model's first layer reads: float32 ``(samples, seqlen,
        spec.stream)`` of int64 ``tokens``."""
        return torch.cat(
            [
                cast(
                    self.transform.embedding(part.double()),
                    self.source.dtype,
                    self.source.embedding_name,
                ).float()
                for part in self.source.embed(tokens).split(1)
            ]
        )

    def head(self) -> tuple[dict[str, torch.Tensor], float | None]:
        """The stored final norm and head, by their full names, and the relative error of a
        quantized head."""
        table, dtype = self.source.spec.architecture, self.source.dtype
        norm, name = self.source.norm_name, f"{table.lm_head}.weight"
        gamma = self.source.tensor(norm).double()
        stored = {norm: cast(self.transform.final_norm(gamma), dtype, norm)}
        if self.tied:
            return stored, None
        weight = self.source.tensor(self.source.head_name)
        slices = (self.transform.head(part.double(), gamma) for part in weight.split(HEAD_ROWS))
        scheme = self.schema.scheme(table.lm_head)
        if scheme is None:
            return stored | {name: _cast_rows(slices, weight.shape, dtype, name)}, None
        parts = ((part, quantize_rtn(part, scheme.weights, name)) for part in slices)
        quantized, error = store(parts, weight.shape, scheme.weights, table.lm_head)
        return stored | quantized, error

    def output_moments(
        self, index: int, loaded: LayerTensors, moments: Mapping[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """Those of the converted layer, of those of the original one by linear."""
        return self.transform.output_moments(index, loaded, self.studies[index].scales, moments)

    def layer(
        self, index: int, loaded: LayerTensors, round_layer: RoundLayer | None = None
    ) -> FinishedLayer:
        """Convert decoder layer ``index``, ``loaded`` from the source, rounding to nearest what
        ``round_layer`` does not round.

        Raises:
            CheckpointError: a tensor exceeds the range of ``dtype``.
        """
        spec, dtype, study = self.source.spec, self.source.dtype, self.studies[index]
        prefix, table = spec.layer_prefix(index), spec.layer_table(index)
        layer = {name: tensor.double() for name, tensor in loaded.items()}
        self.transform.layer(index, layer, study.scales)
        rounded = {} if round_layer is None else round_layer(index, layer)
        errors: dict[str, float] = {}
        output: dict[str, torch.Tensor] = {}
        for linear in table.linears:
            scheme = self.schema.scheme(prefix + linear)
            if scheme is not None:
                weight = layer.pop(f"{linear}.weight")
                done = rounded.pop(linear, None)
                parts = [
                    (
                        weight,
                        done or quantize_rtn(weight, scheme.weights, f"{prefix}{linear}.weight"),
                    )
                ]
                stored, errors[linear] = store(parts, weight.shape, scheme.weights, prefix + linear)
                output |= stored
        output |= {
            prefix + name: cast(
                tensor, torch.float32 if name in table.parameters else dtype, prefix + name
            )
            for name, tensor in layer.items()
        }
        record = LayerRecord(
            weight_error=errors,
            smoothing=study.smoothing,
            experts=study.experts,
            unseen_experts=study.unseen_experts,
            norm_scales={
                norm: ScaleRange(smallest=float(scales.min()), largest=float(scales.max()))
                for norm, scales in study.scales.norms.items()
            },
            clips=study.clips,
            sensitivity=study.sensitivity,
        )
        return FinishedLayer(record, {name: tensor.contiguous() for name, tensor in output.items()})


def _cast_rows(
    parts: Iterable[torch.Tensor], shape: Sequence[int], dtype: torch.dtype, name: str
) -> torch.Tensor:
    """:func:`cast` of a tensor of ``shape`` whose rows come in ``parts``; on the CPU, where it
    is written from."""
    stored, row = torch.empty(*shape, dtype=dtype), 0
    for part in parts:
        rows = slice(row, row := row + len(part))
        stored[rows] = cast(part, dtype, name)
    return stored


def cast(tensor: torch.Tensor, dtype: torch.dtype, name: str) -> torch.Tensor:
    """A folded tensor in the dtype it is stored in.

    Raises:
        CheckpointError: a value exceeds its range.
    """
    stored = tensor.to(dtype)
    if not stored.isfinite().all():
        raise CheckpointError(
            f"tensor {name}: largest magnitude {tensor.abs().max():.3g} after the folds exceeds the"
            f" range of {dtype}. Convert from a bfloat16 checkpoint."
        )
    return stored


WrittenLayer = tuple[LayerRecord, dict[str, TensorRecord]]
"""A layer that is in its file: its entry in the manifest, and those of its tensors."""


def threads_of_worker(workers: int) -> int:
    """Threads that each worker computes with: this process's, shared evenly."""
    return max(1, torch.get_num_threads() // workers)


def write_layers(
    converter: Converter, indices: Iterable[int], folder: Path, workers: int
) -> Iterator[WrittenLayer]:
    """Convert layers in ``workers`` processes into their files in ``folder``; they are given in the
    order of ``indices``.

    Raises:
        CheckpointError: a tensor is damaged.
        OutputError: the file system refuses, or a worker was killed.
    """
    # Without torch's own pickling, which would hand tensors over in shared memory: containers have
    # little of it.
    job = pickle.dumps((converter, folder, threads_of_worker(workers)))
    pool = ProcessPoolExecutor(
        workers, mp_context=get_context("spawn"), initializer=_begin, initargs=(job,)
    )
    try:
        for future in [pool.submit(_convert, index) for index in indices]:
            yield future.result()
    except BrokenProcessPool as error:
        raise OutputError(
            "a worker process ended before its layer was finished, killed by the system for want of"
            " memory, most likely. Use fewer --workers; the same command then goes on from the last"
            " finished layer."
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


@dataclass
class _Worker:
    """What a worker process was begun with."""

    converter: Converter | None = None
    folder: Path = Path()


_this = _Worker()


def _begin(job: bytes) -> None:
    _this.converter, _this.folder, threads = pickle.loads(job)
    torch.set_num_threads(threads)
    # Ctrl-C reaches every process of the terminal: what to do about it is for the parent to decide.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = parent_process()
    assert parent is not None
    connection.wait([parent.sentinel])
    os._exit(1)


def _convert(index: int) -> WrittenLayer:
    assert _this.converter is not None
    source = _this.converter.source
    done = _this.converter.layer(index, source.layer(index))
    return done.record, write_part(_this.folder, index + 2, source.spec.layers + 2, done.tensors)


def describe_model(
    directory: ResumableDirectory,
    config: ConvertConfig,
    converter: Converter,
    decisions: Decisions,
    *,
    side_files: Iterable[Path],
    source_digests: Mapping[str, str],
    layers: Sequence[LayerRecord],
    tensors: Mapping[str, TensorRecord],
    head_error: float | None,
    distillation: DistillationRecord | None = None,
) -> None:
    """Write everything that is no weight; the configuration makes the directory a model, the
    manifest comes last.

    Args:
        directory: holds all parts.
        config, converter, decisions: of the conversion.
        side_files: what is copied from the source, relative to it.
        source_digests: SHA-256 of the source's files by name.
        layers, tensors, head_error: of the parts.
        distillation: what came of it, if it is done.

    Raises:
        OutputError: the file system refuses.
    """
    checkpoint, spec = converter.source.checkpoint, converter.source.spec
    write_index(directory, tensors)
    for file in side_files:
        directory.copy(checkpoint.path, file)
    directory.write_tensors(
        TRANSFORM_NAME, transform_tensors(checkpoint, converter.transform, decisions.studies)
    )
    schema = converter.schema.model_copy(
        update={"transform_sha256": file_digest(directory.path / TRANSFORM_NAME)}
    )
    configuration = {key: value for key, value in checkpoint.config.items() if key != "auto_map"}
    configuration |= _stored_keys(converter, configuration, ["dtype"])
    if isinstance(inner := configuration.get("text_config"), dict):
        configuration["text_config"] = inner | _stored_keys(converter, inner, [])
        configuration["text_config"] |= server_keys(spec)
    else:
        configuration |= server_keys(spec)
    configuration["transformers_weights"] = TRANSFORMERS_WEIGHTS
    configuration["quantization_config"] = schema.model_dump(mode="json")
    directory.write_json(CONFIG_NAME, configuration)
    (directory.path / MANIFEST_NAME).unlink(missing_ok=True)
    manifest = Manifest(
        config=_without_place(config),
        source=SourceRecord(
            model_type=spec.architecture.model_type,
            tied=spec.tied,
            files={name: source_digests[name] for name in [CONFIG_NAME, *checkpoint.files]},
        ),
        packages=package_versions(),
        calibration=_calibration(decisions),
        rotations=_rotations(decisions),
        distillation=distillation,
        device=device_kind(checkpoint.device),
        layers=list(layers),
        lm_head_weight_error=head_error,
        tensors=dict(tensors),
        files=directory.digests(),
    )
    directory.write_json(MANIFEST_NAME, manifest.model_dump(mode="json"))


def _stored_keys(
    converter: Converter, configuration: Mapping[str, Any], least: list[str]
) -> dict[str, Any]:
    """What a configuration says of the stored tensors."""
    # transformers writes dtype today and torch_dtype in former years; readers of either must find
    # the same.
    keys = [key for key in ("dtype", "torch_dtype") if key in configuration] or least
    dtype = str(converter.source.dtype).removeprefix("torch.")
    # Of a text tower the server reads its own, transformers that around it.
    return dict.fromkeys(keys, dtype) | {"tie_word_embeddings": converter.tied}


def _calibration(decisions: Decisions) -> CalibrationRecord | None:
    tokens = decisions.tokens
    if tokens is None:
        return None
    return CalibrationRecord(
        samples=tokens.shape[0], seqlen=tokens.shape[1], tokens_sha256=tokens_digest(tokens)
    )


def _without_place(config: ConvertConfig) -> ConvertConfig:
    """The options without the place of a calibration file, which would make the same conversion
    differ by machine."""
    file = Path(config.calib)
    return config.model_copy(update={"calib": file.name}) if file.is_file() else config


def _rotations(decisions: Decisions) -> RotationRecord | None:
    transform = decisions.transform
    if transform.online.down_proj is None:
        return None
    r2 = [choose_block(head_dim).size for head_dim in transform.spec.rotated_heads]
    return RotationRecord(
        r1=choose_block(transform.spec.hidden).size,
        r2=r2 if len(r2) > 1 else next(iter(r2), None),
        r4=transform.online.down_proj.block,
        seed=transform.seed,
        sign_losses=decisions.sign_losses,
        learned=decisions.learned,
    )
