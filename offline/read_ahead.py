# SPDX-License-Identifier: Apache-2.0
"""Reading of the source beside the work on it: while a decoder layer is converted, the next one
is fetched from the disk."""

from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import torch

from smoothrot_offline.architectures import ModelSpec
from smoothrot_offline.checkpoint import Checkpoint
from smoothrot_offline.device import CPU

LayerTensors = dict[str, torch.Tensor]


def load_layer(checkpoint: Checkpoint, spec: ModelSpec, index: int) -> LayerTensors:
    """The tensors of a decoder layer, by names relative to it, in their stored dtype.

    Raises:
        CheckpointError: see :meth:`Checkpoint.load`.
    """
    return checkpoint.load_relative(spec.layer_prefix(index), spec.layer_tensors())


def layers_ahead(
    checkpoint: Checkpoint, spec: ModelSpec, indices: Iterable[int]
) -> Iterator[LayerTensors]:
    """:func:`load_layer` of each of ``indices``, the next one read and checked by a thread while
    the caller works on one.

    At most one layer waits, in the CPU's memory; what is wrong with it is raised when it is asked
    for.
    """
    unplaced = checkpoint.on(CPU)
    with ThreadPoolExecutor(1) as pool:
        waiting: Future[LayerTensors] | None = None
        for index in indices:
            following = pool.submit(load_layer, unplaced, spec, index)
            if waiting is not None:
                yield checkpoint.placed(waiting.result())
            waiting = following
        if waiting is not None:
            yield checkpoint.placed(waiting.result())
