# SPDX-License-Identifier: Apache-2.0
"""Experts as transformers has them in memory, and stores them if it is told to: those of a layer in
two tensors, ``gate_up_proj (experts, 2 * width, hidden)`` and ``down_proj (experts, hidden,
width)``; some families with inputs before outputs, gates and ups taking turns, biases beside them.
They are taken apart by name alone; of the stored tensor an expert's part is read."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from smoothrot_offline.source.architecture import EXPERT, Architecture
from smoothrot_offline.source.mixtures import MAX_EXPERTS
from smoothrot_offline.source.stored import TensorInfo
from smoothrot_vllm.errors import CheckpointError

_GATE_UP, _DOWN = "mlp.experts.gate_up_proj", "mlp.experts.down_proj"
_ROUTER = "mlp.gate.weight"
_OUTPUTS = "outputs"


@dataclass(frozen=True)
class _Form:
    """A tensor that holds something of a linear of all experts: what, by the end of a separate
    one's name, and what its sizes are of."""

    of: str
    sizes: tuple[str, ...]

    @property
    def outputs(self) -> int:
        """Which of the sizes is that of outputs."""
        return self.sizes.index(_OUTPUTS)


_APART = {"": _Form("weight", ("experts", _OUTPUTS, "inputs"))}
_INTERLEAVED = {
    "": _Form("weight", ("experts", "inputs", _OUTPUTS)),
    "_bias": _Form("bias", ("experts", _OUTPUTS)),
    "_blocks": _Form("blocks", ("experts", _OUTPUTS, "blocks", "bytes")),
    "_scales": _Form("scales", ("experts", _OUTPUTS, "blocks")),
}
"""By the end of the stored name."""


def separated(tensors: Mapping[str, TensorInfo], table: Architecture) -> dict[str, TensorInfo]:
    """Tensors of a checkpoint by the names of separate experts, as the table of its family has
    them.

    Raises:
        CheckpointError: a fused tensor has another shape, they are of too many experts, or an
            expert is there in both forms.
    """
    if table.experts is None:
        return dict(tensors)
    forms = _INTERLEAVED if table.experts.interleaved else _APART
    stored = "|".join(map(re.escape, (_GATE_UP, _DOWN, _ROUTER)))
    names = re.compile(rf"(.*\.layers\.\d+\.)({stored})({'|'.join(forms)})")
    found = {name: match for name in tensors if (match := names.fullmatch(name))}
    fused = [name for name, match in found.items() if match[2] != _ROUTER]
    if not fused:
        return dict(tensors)
    count = 0
    for name in fused:
        shape, form = tensors[name].shape, forms[found[name][3]]
        is_gate_up = found[name][2] == _GATE_UP
        if len(shape) != len(form.sizes) or (is_gate_up and shape[form.outputs] % 2):
            wanted = ", ".join(form.sizes)
            if is_gate_up:
                wanted = wanted.replace(_OUTPUTS, "2 * width")
            raise CheckpointError(
                f"tensor {name}: expected the {form.of} of all experts of a layer, ({wanted}), got"
                f" {shape}. Fetch the checkpoint again."
            )
        count += shape[0] if form.of in ("weight", "blocks") else 0
    if count > 2 * MAX_EXPERTS:
        raise CheckpointError(
            f"tensor {fused[0]} and others like it: expected at most {MAX_EXPERTS} experts in all"
            f" layers, got {count // 2}. Fetch the checkpoint again."
        )
    apart = {name: info for name, info in tensors.items() if name not in found}
    for name, match in found.items():
        for expert, info in _parts(tensors[name], match[2], forms[match[3]], table):
            if match[1] + expert in apart:
                raise CheckpointError(
                    f"tensor {name}: expected the experts of a layer fused or each by itself, got"
                    f" {match[1] + expert} too. Remove one of them from the checkpoint."
                )
            apart[match[1] + expert] = info
    return apart


def _parts(
    info: TensorInfo, stored: str, form: _Form, table: Architecture
) -> Iterator[tuple[str, TensorInfo]]:
    """What a tensor is made of, by names relative to its layer."""
    assert table.experts is not None
    if stored == _ROUTER:
        yield f"{table.experts.router}.weight", info
        return
    names = (table.experts.gate, table.up) if stored == _GATE_UP else (table.down,)
    height, turned = info.shape[form.outputs] // len(names), form.outputs == 2
    others = (size for at, size in enumerate(info.shape) if at not in (0, form.outputs))
    shape = (height, *others)
    for e in range(info.shape[0]):
        for place, name in enumerate(names):
            own = (
                slice(place, None, len(names))
                if table.experts.interleaved
                else slice(place * height, (place + 1) * height)
            )
            yield (
                f"{name.replace(EXPERT, str(e))}.{form.of}",
                replace(
                    info,
                    shape=shape,
                    part=(e, slice(None), own) if turned else (e, own),
                    turned=turned,
                ),
            )
