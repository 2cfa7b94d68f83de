# SPDX-License-Identifier: Apache-2.0
"""The CUDA kernels of experts equal the reference expert by expert: ragged and empty ones, any
table, sums in order."""

from collections.abc import Iterator

import pytest
import torch
from emulator import Emulator

from smoothrot_vllm import reference
from smoothrot_vllm.grouped_experts import TILE_TOKENS, Route

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
COUNTS = [[1], [0, 3, 0, 1], [64, 65, 0, 1, 17], [130, 2]]
"""Tokens of each expert: none, one, a full tile, one more than that, and three tiles."""
UNTOUCHED = 777.0


@pytest.fixture(
    params=[(0, True), (1, True), (0, False), (1, False)],
    ids=["int4", "int4-reverse", "int8", "int8-reverse"],
)
def emulator(
    request: pytest.FixtureRequest, emulator_int4: Emulator, emulator_int8: Emulator
) -> Iterator[Emulator]:
    reverse, native_int4 = request.param
    chosen = emulator_int4 if native_int4 else emulator_int8
    with chosen.options(reverse_order=reverse):
        yield chosen


class Experts:
    """Random experts and the tokens of each, codes over their whole range."""

    def __init__(
        self,
        counts: list[int],
        outputs: int,
        inputs: int,
        act_bits: int,
        weight_bits: int,
        group: int | None = None,
    ):
        top, weight_top = reference.quant_max(act_bits), reference.quant_max(weight_bits)
        self.counts, self.bits = counts, (8, weight_bits)
        self.chosen = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
        self.tiles = Route.of(self.chosen[:, None], len(counts)).tiles
        self.codes = torch.randint(-top - 1, top + 1, (len(self.chosen), inputs), dtype=torch.int8)
        weight = torch.randint(
            -weight_top - 1, weight_top + 1, (len(counts), outputs, inputs), dtype=torch.int8
        )
        self.weight = reference.encode(weight, weight_bits)
        self.scale = torch.rand(len(self.chosen))
        self.weight_scale = torch.rand(len(counts), outputs, 1)
        self.group_scale = (
            None
            if group is None
            else torch.randint(1, 16, (len(counts), outputs, inputs // group), dtype=torch.uint8)
        )
        self.forms = (
            [self.codes] if act_bits == 8 else [self.codes, reference.pack_int4(self.codes)]
        )

    def expected(self, dtype: torch.dtype) -> torch.Tensor:
        parts = zip(
            self.codes.split(self.counts),
            self.scale.split(self.counts),
            self.weight,
            self.weight_scale,
            [None] * len(self.weight) if self.group_scale is None else self.group_scale,
            strict=True,
        )
        return torch.cat([reference.gemm(*part, None, dtype, *self.bits) for part in parts])

    def run(
        self,
        emulator: Emulator,
        stored: torch.Tensor,
        dtype: torch.dtype,
        tiles: torch.Tensor | None = None,
    ) -> torch.Tensor:
        table = self.tiles if tiles is None else tiles
        arguments = (stored, self.scale, self.weight, self.weight_scale, dtype)
        return emulator.gemm("experts", *arguments, tiles=table, group_scale=self.group_scale)


SHAPES = [
    *((70, 160, bits, None) for bits in (4, 8)),
    *((130, 96, bits, None) for bits in (4, 8)),
    (65, 192, 4, 32),
    (130, 320, 4, 64),
    (33, 128, 4, 128),
]
"""Outputs, inputs, bits of weights, inputs of a group."""


@pytest.mark.parametrize("act_bits", [4, 8])
@pytest.mark.parametrize(("outputs", "inputs", "weight_bits", "group"), SHAPES)
def test_gemm_experts_equals_the_reference(
    emulator: Emulator,
    outputs: int,
    inputs: int,
    weight_bits: int,
    group: int | None,
    act_bits: int,
) -> None:
    for counts, dtype in zip(COUNTS, [*DTYPES, torch.float32], strict=True):
        experts = Experts(counts, outputs, inputs, act_bits, weight_bits, group)
        for multiprocessors in (1, 100):  # wide tiles, narrow ones
            with emulator.options(multiprocessors=multiprocessors):
                for stored in experts.forms:
                    got = experts.run(emulator, stored, dtype)
                    torch.testing.assert_close(got, experts.expected(dtype), rtol=0, atol=0)


def test_surplus_tiles_read_and_write_nothing(emulator_int8: Emulator) -> None:
    experts = Experts([2, 0, 1], 64, 128, 8, 4)
    used = int((experts.tiles[1] < experts.tiles[2]).sum())
    assert used == 2 < experts.tiles.shape[1]
    loads = []
    for tiles in (experts.tiles, experts.tiles[:, :used].contiguous()):
        with emulator_int8.options():
            experts.run(emulator_int8, experts.codes, torch.float32, tiles=tiles)
            loads.append(emulator_int8.counters())
    threads, table_entry = 128, 12
    assert loads[0].stored == loads[1].stored
    assert (
        loads[0].loaded - loads[1].loaded == (experts.tiles.shape[1] - used) * threads * table_entry
    )


@pytest.mark.parametrize(
    ("expert", "first", "end"),
    [(-1, 0, 2), (3, 0, 2), (0, -1, 2), (0, 0, 4), (1, 2, 2), (1, 3, 2), (2**31 - 1, 0, 1)],
)
def test_a_tile_that_makes_no_sense_computes_nothing(
    emulator: Emulator, expert: int, first: int, end: int
) -> None:
    experts = Experts([2, 0, 1], 64, 128, 8, 4)
    tiles = torch.tensor([[expert], [first], [end]], dtype=torch.int32)
    got = experts.run(emulator, experts.codes, torch.float32, tiles=tiles)
    assert (got == UNTOUCHED).all()


def test_each_weight_is_read_once_for_each_tile_of_its_expert(emulator_int4: Emulator) -> None:
    counts = [5, 0, TILE_TOKENS + 1]
    experts = Experts(counts, 128, 256, 8, 4)
    with emulator_int4.options(multiprocessors=100, trace=1):
        experts.run(emulator_int4, experts.codes, torch.bfloat16)
        read = [emulator_int4.loaded_from(own) for own in experts.weight]
    assert read == [
        -(-count // TILE_TOKENS) * own.nbytes
        for count, own in zip(counts, experts.weight, strict=True)
    ]


def test_arguments_out_of_bounds_are_refused(emulator_int4: Emulator) -> None:
    experts = Experts([2, 1], 64, 128, 8, 4)
    bias = torch.ones(64)
    with pytest.raises(RuntimeError, match="cudaError 1"):
        emulator_int4.gemm(
            "experts",
            *(
                experts.codes,
                experts.scale,
                experts.weight,
                experts.weight_scale,
                torch.float32,
                bias,
            ),
            tiles=experts.tiles,
        )
    with pytest.raises(RuntimeError, match="cudaError 1"):
        emulator_int4.combine(
            torch.ones(3, 8), torch.zeros(2, 0, dtype=torch.int32), torch.ones(2, 0), torch.float32
        )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "top_k", "outputs"), [(1, 1, 1), (3, 8, 300), (5, 2, 256)])
def test_combine_adds_from_left_to_right(
    emulator: Emulator, tokens: int, top_k: int, outputs: int, dtype: torch.dtype
) -> None:
    rows = torch.randn(tokens * top_k, outputs) * torch.logspace(-3, 3, tokens * top_k)[:, None]
    sources = torch.randperm(tokens * top_k).view(tokens, top_k).int()
    weights = torch.rand(tokens, top_k)
    expected = torch.zeros(tokens, outputs)
    for k in range(top_k):
        expected = expected + rows[sources[:, k].long()] * weights[:, k, None]
    got = emulator.combine(rows, sources, weights, dtype)
    torch.testing.assert_close(got, expected.to(dtype), rtol=0, atol=0)


def test_combine_shows_a_row_that_is_not_there(emulator_int4: Emulator) -> None:
    sources = torch.tensor([[0, 1], [-1, 0], [2, 0]], dtype=torch.int32)
    got = emulator_int4.combine(torch.ones(2, 40), sources, torch.ones(3, 2), torch.float32)
    assert (got[0] == 2).all()
    assert got[1:].isnan().all()
