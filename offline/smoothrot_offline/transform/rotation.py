# SPDX-License-Identifier: Apache-2.0
"""Orthogonal matrices and what they do to rows, in float64: random-sign Hadamard transforms and
dense blocks."""

import hashlib
from dataclasses import dataclass
from typing import Protocol

import torch

from smoothrot_vllm.hadamard import choose_block, factorize, hadamard_matrix

Tensors = dict[str, torch.Tensor]

_SYLVESTER_STEP = 128
"""Sylvester factors are applied as dense products of at most this order: fewer passes over
memory than butterflies."""


class Orthogonal(Protocol):
    """An orthogonal matrix Q, by what it does to rows. Every fold takes any of them."""

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


class _Identity:
    def rotate(self, x: torch.Tensor) -> torch.Tensor:
        return x


IDENTITY = _Identity()
"""Rotates nothing."""


def random_rotation(size: int, seed: int) -> Rotation:
    """A random-sign Hadamard rotation of the residual stream (R1), block-diagonal where ``size``
    has no Hadamard order.

    Raises:
        UnsupportedModelError: not even a block of order 2 divides ``size``.
    """
    return Rotation(random_signs(size, seed, "R1"), choose_block(size).size)


def seed_for(seed: int, purpose: str) -> int:
    """A seed of its own for each purpose."""
    digest = hashlib.sha256(f"{seed}/{purpose}".encode()).digest()
    return int.from_bytes(digest[:7], "big")


def random_signs(size: int, seed: int, purpose: str) -> torch.Tensor:
    """Float64 ``(size,)`` of +1 and -1, a function of ``seed`` and ``purpose`` alone."""
    generator = torch.Generator().manual_seed(seed_for(seed, purpose))
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


def head_rotations(
    values: int, outputs: int, head_dim: int, matrices: torch.Tensor | None = None
) -> tuple[Orthogonal, Orthogonal]:
    """R2 of what the value projection writes, ``values`` wide, and of what the output projection
    reads, ``outputs`` wide.

    Args:
        matrices: see :func:`~smoothrot_offline.transform.sides.head_rotation`.
    """
    if matrices is None:
        return _hadamard_heads(values, head_dim), _hadamard_heads(outputs, head_dim)
    return DenseRotation(matrices), DenseRotation(
        matrices.repeat_interleave(outputs // values, dim=0)
    )


def head_matrices(kv_heads: int, head_dim: int) -> torch.Tensor:
    """The matrices of R2 if there are no others: float64
    ``(kv_heads, head_dim, head_dim)``."""
    return _hadamard_heads(head_dim, head_dim).matrix().expand(kv_heads, -1, -1).contiguous()


def _hadamard_heads(width: int, head_dim: int) -> Rotation:
    """The Hadamard transform of each head of a row of ``width``, without signs."""
    return Rotation(torch.ones(width, dtype=torch.float64), choose_block(head_dim).size)
