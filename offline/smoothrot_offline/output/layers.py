# SPDX-License-Identifier: Apache-2.0
"""Decoder layers from the source's tensors to the stored ones: read, fold, round, pack; in order,
or in several processes at once."""

import os
import pickle
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import connection, get_context, parent_process
from pathlib import Path

import torch

from smoothrot_offline.decide.study import LayerStudy
from smoothrot_offline.output.journal import KeptFile, keep_layer
from smoothrot_offline.output.manifest import LayerRecord, ScaleRange
from smoothrot_offline.rounding.rtn import QuantizedWeight, quantize_rtn
from smoothrot_offline.source.checkpoint import Checkpoint
from smoothrot_offline.source.family import ModelSpec
from smoothrot_offline.source.layers import LayerTensors, load_layer
from smoothrot_offline.transform.sides import ModelTransform
from smoothrot_vllm.errors import CheckpointError, OutputError
from smoothrot_vllm.format import (
    WEIGHT_PACKED,
    WEIGHT_SCALE,
    QuantizationSchema,
    WeightScheme,
    weight_tensors,
)
from smoothrot_vllm.reference import encode

RoundLayer = Callable[[int, dict[str, torch.Tensor]], dict[str, QuantizedWeight]]
"""Rounds the linears of a transformed layer otherwise than to nearest: see
``SequentialRounding.layer``."""


@dataclass(frozen=True)
class FinishedLayer:
    """A layer's entry in the manifest, and its stored tensors by full name."""

    record: LayerRecord
    tensors: dict[str, torch.Tensor]


@dataclass(frozen=True)
class LayerConverter:
    """Converts the decoder layers of one model, each by itself.

    ``schema`` has the bits of every linear, ``studies`` what was found of each layer; ``dtype`` is
    that of the 16-bit tensors.
    """

    checkpoint: Checkpoint
    spec: ModelSpec
    schema: QuantizationSchema
    transform: ModelTransform
    studies: Sequence[LayerStudy]
    dtype: torch.dtype

    def layer(
        self, index: int, loaded: LayerTensors, round_layer: RoundLayer | None = None
    ) -> FinishedLayer:
        """Convert decoder layer ``index``, ``loaded`` from the source, rounding to nearest what
        ``round_layer`` does not round.

        Raises:
            CheckpointError: a tensor exceeds the range of ``dtype``.
        """
        prefix, study = self.spec.layer_prefix(index), self.studies[index]
        layer = {name: tensor.double() for name, tensor in loaded.items()}
        self.transform.layer(index, layer, study.scales)
        rounded = {} if round_layer is None else round_layer(index, layer)
        errors: dict[str, float] = {}
        output: dict[str, torch.Tensor] = {}
        for linear in self.spec.architecture.linears:
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
            prefix + name: cast(tensor, self.dtype, prefix + name) for name, tensor in layer.items()
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


def store(
    parts: Iterable[tuple[torch.Tensor, QuantizedWeight]],
    shape: Sequence[int],
    scheme: WeightScheme,
    name: str,
) -> tuple[dict[str, torch.Tensor], float]:
    """Stored tensors of the linear of ``shape`` whose rows come in ``parts``, and its relative
    error ``|W - Q(W)| / |W|``."""
    # On the CPU, where it is written from. Allocated first: a small tensor that stays between large
    # ones that go would keep the allocator from using their place again.
    tables = weight_tensors(shape[0], shape[1], scheme)
    stored = {
        f"{name}.{suffix}": torch.empty(size, dtype=dtype)
        for suffix, (size, dtype) in tables.items()
    }
    packed, scales = stored[f"{name}.{WEIGHT_PACKED}"], stored[f"{name}.{WEIGHT_SCALE}"]
    row, error, norm = 0, 0.0, 0.0
    for weight, quantized in parts:
        error += float((weight - quantized.dequantize()).square().sum())
        norm += float(weight.square().sum())
        rows = slice(row, row := row + len(weight))
        packed[rows], scales[rows] = encode(quantized.codes, scheme.bits), quantized.scale
    return stored, relative_error(error, norm)


def relative_error(error: float, norm: float) -> float:
    """``|W - Q(W)| / |W|`` from the squares of both; 0 for a linear that is all zeros, which its
    codes are too."""
    return (error / norm) ** 0.5 if norm else 0.0


def cast_rows(
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


@dataclass(frozen=True)
class KeptLayer:
    """A finished layer in a file of the work folder: its entry in the manifest, the names of its
    tensors in order, the file."""

    record: LayerRecord
    names: list[str]
    file: KeptFile


def threads_of_worker(workers: int) -> int:
    """Threads that each worker computes with: this process's, shared evenly."""
    return max(1, torch.get_num_threads() // workers)


def convert_layers(
    converter: LayerConverter, indices: Iterable[int], folder: Path, workers: int
) -> Iterator[KeptLayer]:
    """Convert layers in ``workers`` processes into files of ``folder``; they are given in the order
    of ``indices``.

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

    converter: LayerConverter | None = None
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


def _convert(index: int) -> KeptLayer:
    assert _this.converter is not None
    done = _this.converter.layer(
        index, load_layer(_this.converter.checkpoint, _this.converter.spec, index)
    )
    return KeptLayer(done.record, list(done.tensors), keep_layer(_this.folder, index, done.tensors))
