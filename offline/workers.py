# SPDX-License-Identifier: Apache-2.0
"""Decoder layers converted by several processes at once, where no layer waits for another: rounding
to nearest.

Each worker reads, folds, rounds and writes a layer's file; this process takes the finished ones in
order, so that reading, computing and writing overlap and the output does not depend on who is
first. A worker ends with the process that it works for.
"""

import os
import pickle
import signal
import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import connection, get_context, parent_process
from pathlib import Path

import torch

from smoothrot_offline.layer import LayerConverter
from smoothrot_offline.manifest import LayerRecord
from smoothrot_offline.read_ahead import load_layer
from smoothrot_offline.resume import KeptFile, keep_layer
from smoothrot_vllm.errors import OutputError


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
