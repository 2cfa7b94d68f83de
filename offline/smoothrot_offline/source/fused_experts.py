# SPDX-License-Identifier: Apache-2.0
"""Experts as transformers has them in memory, and stores them if it is told to: those of a layer in
two tensors, ``gate_up_proj (experts, 2 * width, hidden)`` and ``down_proj (experts, hidden,
width)``. They are taken apart by name alone; of the stored tensor an expert's part is read."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace

from smoothrot_offline.source.architecture import EXPERT, Architecture
from smoothrot_offline.source.mixtures import MAX_EXPERTS
from smoothrot_offline.source.stored import TensorInfo
from smoothrot_vllm.errors import CheckpointError

_GATE_UP, _DOWN = "mlp.experts.gate_up_proj", "mlp.experts.down_proj"
_ROUTER = "mlp.gate.weight"
_NAMES = re.compile(
    rf"(.*\.layers\.\d+\.)({re.escape(_GATE_UP)}|{re.escape(_DOWN)}|{re.escape(_ROUTER)})"
)


def separated(tensors: Mapping[str, TensorInfo], table: Architecture) -> dict[str, TensorInfo]:
    """Tensors of a checkpoint by the names of separate experts, as the table of its family has
    them.

    Raises:
        CheckpointError: a fused tensor has another shape, they are of too many experts, or an
            expert is there in both forms.
    """
    found = {name: match for name in tensors if (match := _NAMES.fullmatch(name))}
    fused = [name for name, match in found.items() if match[2] != _ROUTER]
    if table.experts is None or not fused:
        return dict(tensors)
    count = 0
    for name in fused:
        shape = tensors[name].shape
        if len(shape) != 3 or (found[name][2] == _GATE_UP and shape[1] % 2):
            wanted = "experts, 2 * width, hidden" if found[name][2] == _GATE_UP else "three sizes"
            raise CheckpointError(
                f"tensor {name}: expected the weights of all experts of a layer, ({wanted}), got"
                f" {shape}. Fetch the checkpoint again."
            )
        count += shape[0]
    if count > 2 * MAX_EXPERTS:
        raise CheckpointError(
            f"tensor {fused[0]} and others like it: expected at most {MAX_EXPERTS} experts in all"
            f" layers, got {count // 2}. Fetch the checkpoint again."
        )
    apart = {name: info for name, info in tensors.items() if name not in found}
    for name, match in found.items():
        for expert, info in _parts(tensors[name], match[2], table):
            if match[1] + expert in apart:
                raise CheckpointError(
                    f"tensor {name}: expected the experts of a layer fused or each by itself, got"
                    f" {match[1] + expert} too. Remove one of them from the checkpoint."
                )
            apart[match[1] + expert] = info
    return apart


def _parts(info: TensorInfo, stored: str, table: Architecture) -> Iterator[tuple[str, TensorInfo]]:
    """What a tensor is made of, by names relative to its layer."""
    assert table.experts is not None
    if stored == _ROUTER:
        yield f"{table.experts.router}.weight", info
        return
    experts, rows, inputs = info.shape
    names = (table.experts.gate, table.up) if stored == _GATE_UP else (table.down,)
    height = rows // len(names)
    for e in range(experts):
        for place, name in enumerate(names):
            part = (e, slice(place * height, (place + 1) * height))
            yield (
                f"{name.replace(EXPERT, str(e))}.weight",
                replace(info, shape=(height, inputs), part=part),
            )
