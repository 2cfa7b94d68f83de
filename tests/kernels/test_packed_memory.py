# SPDX-License-Identifier: Apache-2.0
"""Where packed weights lie: small ones share slabs of huge pages, and none is touched by what
becomes of the others."""

import gc

import psutil
import pytest
import torch

from smoothrot_vllm import ops

SLAB = 32 << 20
"""csrc/torch/huge_pages.h; what is larger than a quarter of it has memory of its own."""
SHAPES = {"small": (256, 512), "larger than a quarter of a slab": (8192, 4096)}


def packed(shape: tuple[int, int], seed: int) -> torch.Tensor:
    columns, inputs = shape
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randint(0, 256, (columns, inputs // 2), dtype=torch.uint8, generator=generator)
    return ops.prepack_weight(weight, torch.rand(columns, 1, generator=generator), None, 4)


def resident() -> int:
    memory: int = psutil.Process().memory_info().rss
    return memory


@pytest.mark.parametrize("shape", SHAPES.values(), ids=list(SHAPES))
def test_weights_keep_their_bytes_while_others_come_and_go(shape: tuple[int, int]) -> None:
    kept = [packed(shape, seed) for seed in range(6)]
    copies = [weight.clone() for weight in kept]
    del kept[1::2], copies[1::2]
    gc.collect()
    others = [packed(shape, 100 + seed) for seed in range(6)]
    assert len({weight.data_ptr() for weight in [*kept, *others]}) == len(kept) + len(others)
    for weight, copy in zip(kept, copies, strict=True):
        assert weight.data_ptr() % 64 == 0
        assert torch.equal(weight, copy)


def test_memory_of_small_weights_is_given_back_with_the_last_of_them() -> None:
    weights = [packed((2048, 2048), seed) for seed in range(60)]
    held = resident()
    size = sum(weight.nbytes for weight in weights)
    assert size > 3 * SLAB
    del weights
    gc.collect()
    # The slab that is still being filled stays.
    assert held - resident() > size - 2 * SLAB
