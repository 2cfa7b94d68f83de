# SPDX-License-Identifier: Apache-2.0
"""What every packing of weights has: tensors that stand for one, checked by their headers, and the
float32 weight that they are worth. Imports no torch, so that a refusal that follows from headers is
quick."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from smoothrot_offline.source.stored import TensorInfo
from smoothrot_vllm.errors import CheckpointError, UnsupportedModelError

if TYPE_CHECKING:  # a refusal by configuration must not wait for it
    import torch

Shape = tuple[int, ...]
FLOATS = ("BF16", "F16", "F32")
"""Dtypes of scales."""
INT32 = ("I32",)
WORD_BITS = 32
_NUMBERS = {2: "two", 3: "three"}
_OTHER_SCALES = {
    "input_scale": "inputs",
    "input_zero_point": "inputs",
    "activation_scale": "inputs",
    "output_scale": "outputs",
    "q_scale": "queries",
    "k_scale": "cached keys",
    "v_scale": "cached values",
    "kv_scale": "cached keys and values",
    "prob_scale": "attention",
}
"""What stored scales beside those of weights are of."""


@dataclass(frozen=True)
class Layout:
    """Shape of a weight, ``(out, in)``, and of each tensor that it is stored as: dtypes and shape,
    by its role. A role is the last part of the tensor's name."""

    shape: Shape
    parts: Mapping[str, tuple[Collection[str], Shape]]


@dataclass(frozen=True)
class Packed:
    """One weight that is stored as other tensors: its shape, and their full names by their
    roles."""

    shape: Shape
    parts: Mapping[str, str]


class Packing(ABC):
    """How the weights of one source are stored, as its ``quantization_config`` says.

    ``title`` names it to people, as in "4-bit GPTQ weights"; ``notes`` is what else they should
    know. A weight is known by a tensor whose role is the first of ``roles``, of ``dtype`` unless
    that is None, and of so many ``dimensions``.
    """

    title: str
    notes: tuple[str, ...] = ()
    roles: ClassVar[tuple[str, ...]]
    dtype: ClassVar[str | None] = None
    dimensions: ClassVar[int] = 2

    @abstractmethod
    def layout(self, there: Mapping[str, Shape]) -> Layout:
        """What a weight must be stored as.

        Args:
            there: shapes of the tensors that there are, by their roles; that of the one it is
                known by has :attr:`dimensions`.
        """

    @abstractmethod
    def unpack(self, name: str, parts: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Float32 ``(out, in)`` of the tensors that the weight ``name`` is stored as, by their
        roles; they have the dtypes and shapes of :meth:`layout`.

        Raises:
            CheckpointError: a value is out of range.
        """

    def find(self, tensors: Mapping[str, TensorInfo]) -> dict[str, Packed]:
        """The weights of a checkpoint that are packed so, by their names.

        Raises:
            CheckpointError: a tensor that a weight takes is missing or has another dtype or shape,
                or the weight is there unpacked too.
            UnsupportedModelError: there are scales of something other than weights.
        """
        found = {}
        for name, info in tensors.items():
            module, _, role = name.rpartition(".")
            if role in _OTHER_SCALES:
                raise UnsupportedModelError(
                    f"tensor {name}: expected scales of weights alone, got one of"
                    f" {_OTHER_SCALES[role]}, which the source was quantized with. Convert the"
                    " 16-bit original."
                )
            if role != self.roles[0] or (self.dtype is not None and info.dtype != self.dtype):
                continue
            weight = f"{module}.weight"
            if weight != name and weight in tensors:
                raise CheckpointError(
                    f"tensor {weight}: expected the weight once, got {name}, the same in"
                    f" {self.title}, too. Remove one of them from the checkpoint."
                )
            if len(info.shape) != self.dimensions:
                raise CheckpointError(
                    f"tensor {name}: expected {_NUMBERS[self.dimensions]} dimensions, got"
                    f" {info.shape}. Fetch the checkpoint again."
                )
            there = {
                role: tensors[f"{module}.{role}"].shape
                for role in self.roles
                if f"{module}.{role}" in tensors
            }
            layout = self.layout(there)
            parts = {role: f"{module}.{role}" for role in layout.parts}
            for role, (dtypes, shape) in layout.parts.items():
                part = tensors.get(parts[role])
                if part is None or part.dtype not in dtypes or part.shape != shape:
                    got = "none" if part is None else f"{part.dtype} {part.shape}"
                    raise CheckpointError(
                        f"tensor {parts[role]}: expected {' or '.join(dtypes)} {shape} beside"
                        f" {name} {info.shape} of {self.title} weights, got {got}. Fetch the"
                        " checkpoint again."
                    )
            found[weight] = Packed(layout.shape, parts)
        return found


def unsupported(key: str, expected: str, got: Any) -> UnsupportedModelError:
    """The refusal of what a packing's configuration says under ``key``."""
    return UnsupportedModelError(
        f"config.json: quantization_config.{key}: expected {expected}, got {got!r}. Convert the"
        " 16-bit original."
    )


def check_bits(key: str, bits: Any, known: tuple[int, ...] = (4, 8)) -> int:
    """``bits`` of a weight, which must be one of ``known``.

    Raises:
        UnsupportedModelError: it is not.
    """
    if type(bits) is not int or bits not in known:
        raise unsupported(key, f"weights of {' or '.join(map(str, known))} bits", bits)
    return bits


def check_group_size(key: str, size: Any) -> int:
    """Inputs that share a scale, -1 for all of them.

    Raises:
        UnsupportedModelError: it is no such number.
    """
    if type(size) is not int or (size != -1 and size < 1):
        raise unsupported(key, "a positive number, or -1 for all inputs", size)
    return size


def count_groups(inputs: int, group_size: int) -> int:
    """Scales in a row of ``inputs`` weights."""
    return 1 if group_size == -1 else -(-inputs // group_size)


def unpack_words(words: torch.Tensor, bits: int, dim: int) -> torch.Tensor:
    """Codes in words of 32 bits, the first in the lowest bits.

    Args:
        words: int32 ``(n, m)``.
        bits: of a code, 4 or 8.
        dim: in which codes of one word are neighbours.

    Returns:
        uint8 ``(n, m)`` with ``dim`` ``32 / bits`` times as long.
    """
    import torch

    codes = words.contiguous().view(torch.uint8).unflatten(1, (words.shape[1], 4))
    if bits == 4:
        codes = torch.stack((codes & 0xF, codes >> 4), dim=-1).flatten(2)
    return codes.flatten(1) if dim == 1 else codes.transpose(1, 2).flatten(0, 1)


def scaled(
    codes: torch.Tensor,
    zeros: torch.Tensor | int,
    scales: torch.Tensor,
    group_size: int,
    groups: torch.Tensor | None = None,
) -> torch.Tensor:
    """Float32 ``(code - zero) * scale``.

    Args:
        codes: uint8 ``(out, in)``.
        zeros: of the same range, ``(out, groups)``, or one for all.
        scales: ``(out, groups)`` of a float dtype.
        group_size: neighbouring inputs of a group, -1 for all.
        groups: the group of each input, ``(in,)``, where they are not neighbours.
    """
    import torch

    if groups is None:
        size = codes.shape[1] if group_size == -1 else group_size
        groups = torch.arange(codes.shape[1]) // size
    weight = codes.float().contiguous()
    weight -= zeros if isinstance(zeros, int) else zeros.float()[:, groups]
    weight *= scales.float()[:, groups]
    return weight


def check_groups(name: str, groups: torch.Tensor, count: int) -> torch.Tensor:
    """The group of each input, int64 ``(in,)``.

    Raises:
        CheckpointError: one is outside 0 to ``count``.
    """
    wrong = groups[(groups < 0) | (groups >= count)]
    if wrong.numel():
        raise CheckpointError(
            f"tensor {name}: expected groups from 0 to {count - 1}, got {int(wrong[0])}. Fetch the"
            " checkpoint again."
        )
    return groups.long()
