# SPDX-License-Identifier: Apache-2.0
"""Hadamard orders: construction, factorization and the choice of a block."""

import time

import pytest
import torch

from smoothrot_vllm.errors import UnsupportedModelError
from smoothrot_vllm.hadamard import MAX_BASE, base_matrix, choose_block, factorize, hadamard_matrix

NO_CONSTRUCTION = {
    16,
    40,
    56,
    64,
    88,
    96,
    112,
    120,
    136,
    144,
    156,
    160,
    176,
    184,
    188,
    208,
    216,
    232,
    236,
    248,
    256,
}
"""Multiples of 4 that neither Paley construction nor a Williamson quadruple in the table
reaches."""

BASES = [1, 2, *(order for order in range(4, MAX_BASE + 1, 4) if order not in NO_CONSTRUCTION)]

MODEL_SIZES = {
    576: (36, 16),
    896: (28, 32),
    1536: (12, 128),
    2048: (1, 2048),
    3584: (28, 128),
    4096: (1, 4096),
    4864: (76, 64),
    8192: (1, 8192),
    11008: (172, 64),
    14336: (28, 512),
    18944: (148, 128),
}


@pytest.mark.parametrize("order", BASES)
def test_base_matrix_is_hadamard(order: int) -> None:
    matrix = base_matrix(order)
    assert matrix.dtype == torch.int8
    assert torch.equal(matrix.abs(), torch.ones_like(matrix))
    assert torch.equal(matrix.long() @ matrix.long().T, order * torch.eye(order, dtype=torch.long))


@pytest.mark.parametrize("order", [0, 3, 6, 10, *sorted(NO_CONSTRUCTION), MAX_BASE + 4])
def test_base_matrix_refuses_an_order_it_cannot_build(order: int) -> None:
    with pytest.raises(UnsupportedModelError, match=f"base order {order}:"):
        base_matrix(order)


@pytest.mark.parametrize(("size", "factors"), MODEL_SIZES.items())
def test_model_sizes_factor_with_the_cheapest_base(size: int, factors: tuple[int, int]) -> None:
    found = factorize(size)
    assert found is not None
    assert (found.base, found.power) == factors
    assert found.size == size


@pytest.mark.parametrize("size", [-4, 0, 3, 6, 7, 1001, 2 * 257, 47 * 4])
def test_factorize_finds_nothing_where_there_is_no_order(size: int) -> None:
    assert factorize(size) is None


@pytest.mark.parametrize("size", [1, 2, 8, 12, 24, 36, 576, 896, 1536, 2048])
def test_hadamard_matrix_is_orthonormal(size: int) -> None:
    matrix = hadamard_matrix(size)
    torch.testing.assert_close(
        matrix @ matrix.T, torch.eye(size, dtype=torch.float64), rtol=0, atol=1e-12
    )


@pytest.mark.parametrize(
    ("size", "shards", "block"),
    [
        (8192, 1, 8192),
        (8192, 4, 2048),
        (1536, 2, 768),
        (11008, 2, 5504),
        (11008, 4, 2752),
        (18944, 8, 2368),
        (14, 1, 2),
        (94, 1, 2),
    ],
)
def test_choose_block_takes_the_largest_order_a_shard_holds(
    size: int, shards: int, block: int
) -> None:
    chosen = choose_block(size, shards)
    assert chosen.size == block
    assert size // shards % chosen.size == 0
    assert not any(
        factorize(order)
        for order in range(block + 1, size // shards + 1)
        if size // shards % order == 0
    )


@pytest.mark.parametrize(("size", "shards"), [(8192, 3), (8192, 0), (7, 1), (14, 2)])
def test_choose_block_refuses_with_the_numbers(size: int, shards: int) -> None:
    with pytest.raises(UnsupportedModelError, match=f"size {size}"):
        choose_block(size, shards)


def test_the_default_device_does_not_move_the_matrices() -> None:
    """The ops pack a base matrix on the host, also in a program whose tensors are made on a GPU."""
    base_matrix.cache_clear()
    with torch.device("meta"):
        made = [base_matrix(2), base_matrix(12), hadamard_matrix(24)]
    assert all(
        torch.equal((m.double() @ m.double().T).sign(), torch.eye(len(m), dtype=torch.float64))
        for m in made[:2]
    )
    torch.testing.assert_close(made[2] @ made[2].T, torch.eye(24, dtype=torch.float64))


def test_choose_block_takes_no_time_for_sizes_that_no_model_has() -> None:
    started = time.process_time()
    assert choose_block(2**31 * 12).size == 2**31 * 12
    with pytest.raises(UnsupportedModelError):
        choose_block(2**31 - 1)
    assert time.process_time() - started < 1
