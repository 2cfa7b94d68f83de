# SPDX-License-Identifier: Apache-2.0
"""Hadamard matrices: which orders exist here, how they are built, and how a size is split into
blocks.

A Hadamard matrix of order ``m * 2**k`` is used as ``H_m (x) H_{2**k}`` (Kronecker product), where
the power of two is Sylvester's and ``H_m`` is a base matrix built by Paley's first or second
construction or from a Williamson quadruple. ``size * (m + k)`` additions apply it, instead of
``size ** 2``.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from itertools import product

import torch

from smoothrot_vllm.errors import UnsupportedModelError

MAX_BASE = 256
"""Largest base order that is built: beyond it the dense base step costs more than it spreads."""

# First rows of four symmetric circulants A, B, C, D with A^2 + B^2 + C^2 + D^2 = 4nI (Williamson
# 1944), for the orders 4n that neither Paley construction reaches.
_WILLIAMSON_ROWS = {
    23: (
        "+++++----+-++-+----++++",
        "+-----++-+-++-+-++-----",
        "++-+-+++-++--++-+++-+-+",
        "++-+--+++--++--+++--+-+",
    ),
    29: (
        "+-+----++++--+--+--++++----+-",
        "+-+-+--+-++-++--++-++-+--+-+-",
        "+---+++-++++++--++++++-+++---",
        "+++++--++---+-++-+---++--++++",
    ),
    43: (
        "+++--++++-+-+++-++--------++-+++-+-++++--++",
        "+-+------++++-+-++--+--+--++-+-++++------+-",
        "+-+-++--++-+++++---++--++---+++++-++--++-+-",
        "+--+-+--++++-+--+++-++++-+++--+-++++--+-+--",
    ),
}


@dataclass(frozen=True)
class HadamardFactors:
    """``size = base * power``: the order of the base matrix and of the Sylvester part."""

    base: int
    power: int

    @property
    def size(self) -> int:
        """Order of the whole matrix."""
        return self.base * self.power

    def __str__(self) -> str:
        return str(self.power) if self.base == 1 else f"{self.base}·{self.power}"


def factorize(size: int) -> HadamardFactors | None:
    """Split ``size`` into base order and power of two with the cheapest base, or None if no
    order fits."""
    if size < 1:
        return None
    power = size & -size
    while power >= 1:
        base = size // power
        if base > MAX_BASE:
            return None
        if base == 1 or _constructor(base) is not None:
            return HadamardFactors(base, power)
        power //= 2
    return None


def choose_block(size: int, shards: int = 1) -> HadamardFactors:
    """Largest Hadamard order that divides ``size / shards``, so that each shard holds whole blocks.

    Args:
        size: length of the rotated dimension.
        shards: number of equal tensor-parallel shards that must each rotate on their own.

    Raises:
        UnsupportedModelError: ``shards`` does not divide ``size``, or the shard is odd and has no
            Hadamard block of order 2 or more.
    """
    if shards < 1 or size % shards:
        raise UnsupportedModelError(
            f"Hadamard rotation of size {size}: expected a tensor-parallel size that divides it,"
            f" got {shards}. Choose a --max-tp that divides the dimension."
        )
    shard = size // shards
    # Each base with as many factors of two as the shard has beside it: quick whatever size a
    # configuration claims.
    bases = [
        base
        for base in range(1, MAX_BASE + 1)
        if shard % base == 0 and (base == 1 or _constructor(base) is not None)
    ]
    order = max(base * (shard // base & -(shard // base)) for base in bases)
    if order > 1 and (factors := factorize(order)) is not None:
        return factors
    raise UnsupportedModelError(
        f"Hadamard rotation of size {size} over {shards} shard(s): no Hadamard order divides"
        f" {shard}. Lower --max-tp or convert with --no-rotate."
    )


@lru_cache(maxsize=32)
def base_matrix(order: int) -> torch.Tensor:
    """Unnormalized Hadamard matrix of a base order, int8 ``(order, order)`` with entries +1 and -1.

    Raises:
        UnsupportedModelError: no construction for ``order`` is implemented.
    """
    build = _constructor(order)
    if build is None:
        raise UnsupportedModelError(
            f"Hadamard base order {order}: expected 1, 2, or a multiple of 4 up to {MAX_BASE}"
            " reached by Paley's or Williamson's construction. Use a block size that has one (see"
            " choose_block)."
        )
    return torch.tensor(build(), dtype=torch.int8, device="cpu")


def hadamard_matrix(size: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """Dense orthonormal Hadamard matrix ``(size, size)``, for offline folds and tests.

    Raises:
        UnsupportedModelError: ``size`` has no factorization.
    """
    factors = factorize(size)
    if factors is None:
        raise UnsupportedModelError(
            f"Hadamard matrix of order {size}: no base order up to {MAX_BASE} times a power of two."
        )
    matrix = torch.kron(base_matrix(factors.base).to(dtype), _sylvester(factors.power).to(dtype))
    return matrix / matrix.new_tensor(size).sqrt()


def _sylvester(order: int) -> torch.Tensor:
    matrix = torch.ones(1, 1, device="cpu")
    pair = torch.tensor([[1.0, 1.0], [1.0, -1.0]], device="cpu")
    while matrix.shape[0] < order:
        matrix = torch.kron(matrix, pair)
    return matrix


@lru_cache(maxsize=512)
def _constructor(order: int) -> Callable[[], list[list[int]]] | None:
    """The function that builds ``order`` as rows of +1/-1, or None."""
    if order in (1, 2):
        return lambda: _sylvester(order).int().tolist()
    if order % 4 or order > MAX_BASE:
        return None
    if _prime_power(order - 1) and (order - 1) % 4 == 3:
        return lambda: _paley_one(order - 1)
    if _prime_power(order // 2 - 1) and (order // 2 - 1) % 4 == 1:
        return lambda: _paley_two(order // 2 - 1)
    if order // 4 in _WILLIAMSON_ROWS:
        return lambda: _williamson(_WILLIAMSON_ROWS[order // 4])
    return None


def _paley_one(q: int) -> list[list[int]]:
    """H = I + S with S skew, of order q + 1, for a prime power q = 3 (mod 4) (Paley 1933)."""
    character = _jacobsthal(q)
    rows = [[1] * (q + 1)]
    for i in range(q):
        rows.append([-1] + [character[i][j] + (i == j) for j in range(q)])
    return rows


def _paley_two(q: int) -> list[list[int]]:
    """Order 2(q + 1) from the symmetric conference matrix of a prime power q = 1 (mod 4) (Paley
    1933)."""
    character = _jacobsthal(q)
    conference = [[0] + [1] * q] + [[1] + character[i] for i in range(q)]
    n = q + 1
    rows = [[0] * (2 * n) for _ in range(2 * n)]
    for i, j in product(range(n), range(n)):
        c, d = conference[i][j], int(i == j)
        rows[i][j], rows[i][j + n] = c + d, c - d
        rows[i + n][j], rows[i + n][j + n] = c - d, -c - d
    return rows


def _williamson(first_rows: tuple[str, str, str, str]) -> list[list[int]]:
    """Order 4n: the Williamson array over four symmetric circulants given by their first rows."""
    n = len(first_rows[0])
    signs = [[1 if c == "+" else -1 for c in row] for row in first_rows]
    array = ((0, 1, 2, 3), (-1, 0, -3, 2), (-2, 3, 0, -1), (-3, -2, 1, 0))
    flips = ((1, 1, 1, 1), (-1, 1, -1, 1), (-1, 1, 1, -1), (-1, -1, 1, 1))
    rows = []
    for block_row, flip_row in zip(array, flips, strict=True):
        for i in range(n):
            row = []
            for which, flip in zip(block_row, flip_row, strict=True):
                row += [flip * signs[abs(which)][(j - i) % n] for j in range(n)]
            rows.append(row)
    return rows


def _prime_power(q: int) -> tuple[int, int] | None:
    """``(p, n)`` with ``p ** n == q`` and p prime, or None."""
    if q < 2:
        return None
    p = next((d for d in range(2, int(q**0.5) + 1) if q % d == 0), q)
    n, rest = 0, q
    while rest % p == 0:
        n, rest = n + 1, rest // p
    return (p, n) if rest == 1 else None


def _jacobsthal(q: int) -> list[list[int]]:
    """``chi(a_i - a_j)`` over GF(q), where chi is 1 on non-zero squares, -1 on non-squares, 0 at
    0."""
    prime_and_degree = _prime_power(q)
    assert prime_and_degree is not None
    p, degree = prime_and_degree
    elements = list(product(range(p), repeat=degree))
    modulus = _irreducible(p, degree)
    squares = {_multiply(a, a, modulus, p) for a in elements if any(a)}

    def chi(a: tuple[int, ...]) -> int:
        return 0 if not any(a) else (1 if a in squares else -1)

    return [
        [chi(tuple((x - y) % p for x, y in zip(a, b, strict=True))) for b in elements]
        for a in elements
    ]


def _multiply(
    a: tuple[int, ...], b: tuple[int, ...], modulus: tuple[int, ...], p: int
) -> tuple[int, ...]:
    """Product in GF(p)[t] / modulus; coefficients lowest degree first, modulus monic without its
    leading 1."""
    degree = len(a)
    out = [0] * (2 * degree - 1)
    for i, j in product(range(degree), range(degree)):
        out[i + j] = (out[i + j] + a[i] * b[j]) % p
    for i in range(2 * degree - 2, degree - 1, -1):
        for j in range(degree):
            out[i - degree + j] = (out[i - degree + j] - out[i] * modulus[j]) % p
    return tuple(out[:degree])


def _irreducible(p: int, degree: int) -> tuple[int, ...]:
    """A monic irreducible polynomial of the given degree over GF(p), without its leading 1."""
    if degree == 1:
        return (0,)
    elements = list(product(range(p), repeat=degree))
    for modulus in elements:
        nonzero = [a for a in elements if any(a)]
        if all(any(_multiply(a, b, modulus, p)) for a, b in product(nonzero, nonzero)):
            return modulus
    raise AssertionError(f"GF({p}^{degree}) has an irreducible polynomial")
