# SPDX-License-Identifier: Apache-2.0
"""Norm fold, R1, R2 and the offline half of R4, in float64, on the tensors of one decoder layer.

A linear computes ``y = x W^T + b`` with W stored ``(out, in)``. Rotating its input by an orthogonal
Q (``x -> x Q``) means ``W -> W Q``; rotating its output means ``W -> Q^T W`` and ``b -> b Q``
(QuaRot, arXiv 2404.00456; SpinQuant, arXiv 2405.16406). Every function here replaces entries of the
mapping it is given and leaves the layer's function as it was, up to the rotations of what goes in
and out.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch

from smoothrot_offline.source.family import Architecture, ModelSpec
from smoothrot_vllm.hadamard import choose_block, factorize, hadamard_matrix

Tensors = dict[str, torch.Tensor]

_SYLVESTER_STEP = 128
"""Sylvester factors are applied as dense products of at most this order: fewer passes over
memory than butterflies."""


class Orthogonal(Protocol):
    """An orthogonal matrix Q, by what it does to rows. Every fold below takes any of them."""

    def rotate(self, x: torch.Tensor) -> torch.Tensor:
        """``x Q`` for float64 ``x (..., size)``."""
        ...


@dataclass(frozen=True)
class Rotation:
    """``Q = D (I (x) H_block)``: random signs D, then an orthonormal Hadamard transform of each
    block."""

    signs: torch.Tensor
    block: int

    def rotate(self, x: torch.Tensor) -> torch.Tensor:
        """``x Q`` for float64 ``x (..., size)``."""
        return hadamard(x * self.signs.to(x.device), self.block)

    def matrix(self) -> torch.Tensor:
        """Q itself, float64 ``(size, size)``."""
        return self.rotate(torch.eye(len(self.signs), dtype=torch.float64))


@dataclass(frozen=True)
class DenseRotation:
    """``Q`` = the block diagonal of ``blocks (B, n, n)``, each of them orthogonal; ``B n`` is
    its size."""

    blocks: torch.Tensor

    def rotate(self, x: torch.Tensor) -> torch.Tensor:
        """``x Q`` for ``x (..., size)`` of the dtype of ``blocks``: float64 for folds, float32
        for trials."""
        count, order, _ = self.blocks.shape
        return (
            (x.reshape(-1, count, order).transpose(0, 1) @ self.blocks)
            .transpose(0, 1)
            .reshape(x.shape)
        )


def random_rotation(size: int, seed: int) -> Rotation:
    """A random-sign Hadamard rotation of the residual stream (R1), block-diagonal where ``size``
    has no Hadamard order.

    Raises:
        UnsupportedModelError: not even a block of order 2 divides ``size``.
    """
    return Rotation(random_signs(size, seed, "R1"), choose_block(size).size)


def random_signs(size: int, seed: int, purpose: str) -> torch.Tensor:
    """Float64 ``(size,)`` of +1 and -1, a function of ``seed`` and ``purpose`` alone."""
    digest = hashlib.sha256(f"{seed}/{purpose}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
    return torch.randint(0, 2, (size,), generator=generator).double() * 2 - 1


def hadamard(x: torch.Tensor, block: int) -> torch.Tensor:
    """``x (I (x) H_block)``, orthonormal, along the last axis of ``x``, in its dtype: float64 for
    folds, float32 for trials.

    Equals :func:`smoothrot_vllm.reference.hadamard_transform` over ``sqrt(block)`` up to the order
    of additions.
    """
    factors = factorize(block)
    assert factors is not None
    assert x.shape[-1] % block == 0
    orders: list[int] = []
    power = factors.power
    while power > 1:
        orders.insert(0, min(power, _SYLVESTER_STEP))
        power //= orders[0]
    if factors.base > 1:
        orders.insert(0, factors.base)
    y, inner = x, block
    for order in orders:
        inner //= order
        matrix = hadamard_matrix(order).to(x.device, x.dtype)
        # H_block = H_a (x) H_b (x) ...: axis by axis, y_j = sum_i x_i H_ij. The last axis is one
        # plain product.
        y = matrix.T @ y.reshape(-1, order, inner) if inner > 1 else y.reshape(-1, order) @ matrix
    return y.reshape(x.shape)


def fold_norms(layer: Tensors, table: Architecture) -> None:
    """Move what each norm multiplies by into the linears that read it: ``W -> W diag(gamma)``,
    ``gamma -> 1``."""
    for norm, readers in table.readers.items():
        gamma = layer[f"{norm}.weight"] + table.norm_offset
        for reader in readers:
            layer[f"{reader}.weight"] = layer[f"{reader}.weight"] * gamma
        layer[f"{norm}.weight"] = torch.full_like(gamma, 1 - table.norm_offset)


def rotate_residual(layer: Tensors, table: Architecture, rotation: Orthogonal) -> None:
    """R1: the residual stream becomes ``x Q``. The norms must have been folded: only a unit norm
    commutes with Q."""
    for readers in table.readers.values():
        for reader in readers:
            layer[f"{reader}.weight"] = rotation.rotate(layer[f"{reader}.weight"])
    for writer in table.writers:
        layer[f"{writer}.weight"] = rotation.rotate(layer[f"{writer}.weight"].T).T.contiguous()
        if f"{writer}.bias" in layer:
            layer[f"{writer}.bias"] = rotation.rotate(layer[f"{writer}.bias"])


def rotate_reader_inputs(layer: Tensors, table: Architecture, block: int) -> None:
    """Offline half of R1 where it cannot be folded: ``W -> W (I (x) H)`` in every linear that reads
    a norm.

    The norms keep their weights: what the server rotates, ``x (I (x) H)``, is their output as it
    stands.
    """
    for readers in table.readers.values():
        for reader in readers:
            layer[f"{reader}.weight"] = hadamard(layer[f"{reader}.weight"], block)


def rotate_heads(layer: Tensors, spec: ModelSpec, matrices: torch.Tensor | None = None) -> None:
    """R2: each head of the value projection is rotated, and undone in the output projection.

    Attention mixes tokens, not the channels of a head, and its weights sum to one, so a value bias
    rotates like a value. Every query head of a group reads the same rotated value head.

    Args:
        matrices: orthogonal, float64 ``(kv_heads, head_dim, head_dim)``; None rotates every head by
            its Hadamard transform.
    """
    table = spec.architecture
    outputs = layer[f"{table.output}.weight"]
    of_values, of_outputs = head_rotations(spec.values, outputs.shape[1], spec.head_dim, matrices)
    value, bias = f"{table.value}.weight", f"{table.value}.bias"
    layer[value] = on_last_rows(layer[value], spec.values, lambda rows: of_values.rotate(rows.T).T)
    if bias in layer:
        layer[bias] = on_last_rows(layer[bias], spec.values, of_values.rotate)
    layer[f"{table.output}.weight"] = of_outputs.rotate(outputs)


def head_rotations(
    values: int, outputs: int, head_dim: int, matrices: torch.Tensor | None = None
) -> tuple[Orthogonal, Orthogonal]:
    """R2 of what the value projection writes, ``values`` wide, and of what the output projection
    reads, ``outputs`` wide.

    Args:
        matrices: see :func:`rotate_heads`.
    """
    if matrices is None:
        return _hadamard_heads(values, head_dim), _hadamard_heads(outputs, head_dim)
    return DenseRotation(matrices), DenseRotation(
        matrices.repeat_interleave(outputs // values, dim=0)
    )


def head_matrices(kv_heads: int, head_dim: int) -> torch.Tensor:
    """The matrices by which :func:`rotate_heads` rotates if it is given none: float64
    ``(kv_heads, head_dim, head_dim)``."""
    return _hadamard_heads(head_dim, head_dim).matrix().expand(kv_heads, -1, -1).contiguous()


def _hadamard_heads(width: int, head_dim: int) -> Rotation:
    """The Hadamard transform of each head of a row of ``width``, without signs."""
    return Rotation(torch.ones(width, dtype=torch.float64), choose_block(head_dim).size)


def rotate_down_input(layer: Tensors, table: Architecture, rotation: Rotation) -> None:
    """Offline half of R4: the signs go into the rows of up_proj, ``D (I (x) H)`` into the inputs of
    down_proj.

    The gated product ``act(gate) * up`` is linear in ``up``, so what the server has left to do is
    the Hadamard transform of down_proj's input, without signs. The experts of a layer share the
    signs.
    """
    for up, down in table.products:
        scale_up(layer, up, rotation.signs)
        layer[f"{down}.weight"] = rotation.rotate(layer[f"{down}.weight"])


def scale_up(layer: Tensors, up: str, factors: torch.Tensor) -> None:
    """Multiply what linear ``up`` produces, channel by channel, by ``factors (f,)``: its rows,
    the last ``f`` of a fused one."""
    weight, bias = f"{up}.weight", f"{up}.bias"
    layer[weight] = on_last_rows(layer[weight], len(factors), lambda rows: rows * factors[:, None])
    if bias in layer:
        layer[bias] = on_last_rows(layer[bias], len(factors), lambda rows: rows * factors)


def on_last_rows(
    tensor: torch.Tensor, count: int, change: Callable[[torch.Tensor], torch.Tensor]
) -> torch.Tensor:
    """``tensor`` with its last ``count`` rows changed: all of them, or those of the last linear
    of a fused one."""
    return torch.cat([tensor[:-count], change(tensor[-count:])])
