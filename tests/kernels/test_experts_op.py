# SPDX-License-Identifier: Apache-2.0
"""``ops.experts`` against its definition, and under torch.compile."""

from functools import partial
from typing import Any

import pytest
import torch
from torch._subclasses import FakeTensorMode

from smoothrot_vllm import ops, reference
from smoothrot_vllm.errors import ConfigError
from smoothrot_vllm.grouped_experts import TILE_TOKENS, Route, most_tiles

EXPERTS, TOP_K, HIDDEN, INTERMEDIATE = 5, 2, 64, 96
Arguments = tuple[Any, ...]


def random_experts(
    tokens: int, act_bits: int, weight_bits: int, group_size: int, block: int, dtype: torch.dtype
) -> tuple[Arguments, Arguments]:
    """Arguments of the reference and of the op; no token goes to expert 3."""
    generator = torch.Generator().manual_seed(tokens)
    x = torch.randn(tokens, HIDDEN, generator=generator).to(dtype)
    logits = torch.randn(tokens, EXPERTS, generator=generator)
    logits[:, 3] = -torch.inf
    weights, chosen = logits.softmax(-1).topk(TOP_K)
    top = reference.quant_max(weight_bits)
    stacks, packed = [], []
    for rows, inputs in ((2 * INTERMEDIATE, HIDDEN), (HIDDEN, INTERMEDIATE)):
        codes = torch.randint(
            -top - 1, top + 1, (EXPERTS, rows, inputs), generator=generator, dtype=torch.int8
        )
        encoded = reference.encode(codes, weight_bits)
        scale = (torch.rand(EXPERTS, rows, 1, generator=generator) + 0.5) / (top * inputs**0.5)
        groups = None
        if group_size != -1:
            shape = (EXPERTS, rows, inputs // group_size)
            groups = torch.randint(1, 16, shape, generator=generator, dtype=torch.uint8)
            scale /= 8
        stacks.append((encoded, scale, groups))
        packed += [ops.prepack_weight(encoded, scale, groups, weight_bits), scale]
    numbers = (block, 0.9, act_bits, weight_bits)
    chosen = chosen.to(torch.int32)
    given = (x, weights, chosen, *packed, *numbers, group_size)
    return (x, weights, chosen, *stacks, *numbers), given


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tokens", [1, 13, 200])
@pytest.mark.parametrize(
    ("act_bits", "weight_bits", "group_size", "block"),
    [(4, 4, -1, 96), (8, 4, 32, 48), (8, 8, -1, 0), (4, 4, 32, 0)],
)
def test_experts_equal_the_reference(
    tokens: int, act_bits: int, weight_bits: int, group_size: int, block: int, dtype: torch.dtype
) -> None:
    """Bit for bit: with 96 channels an odd number of groups, and experts of one tile and of so many
    that their weights are expanded."""
    defined, given = random_experts(tokens, act_bits, weight_bits, group_size, block, dtype)
    expected, got = reference.experts(*defined), ops.experts(*given)
    assert got.dtype == dtype
    assert torch.equal(got, expected)


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("activation", ["silu", "swigluoai"])
@pytest.mark.parametrize(
    ("tokens", "act_bits", "group_size", "block"),
    [(1, 8, 32, 96), (13, 4, -1, 0), (200, 8, -1, 48)],
)
def test_experts_with_biases_equal_the_reference(
    tokens: int,
    act_bits: int,
    group_size: int,
    block: int,
    activation: reference.Activation,
    dtype: torch.dtype,
) -> None:
    """Bit for bit, with gates and ups beyond the limits; biases in the dtype and in float32."""
    defined, given = random_experts(tokens, act_bits, 4, group_size, block, dtype)
    generator = torch.Generator().manual_seed(5)
    w13_bias = (8 * torch.randn(EXPERTS, 2 * INTERMEDIATE, generator=generator)).to(dtype)
    w2_bias = torch.randn(EXPERTS, HIDDEN, generator=generator)
    define = partial(reference.experts, biases=(w13_bias, w2_bias), activation=activation)
    expected = define(*defined)
    got = ops.experts(*given, w13_bias, w2_bias, activation)
    assert torch.equal(got, expected)
    assert not torch.equal(got, ops.experts(*given, None, None, activation))


@pytest.mark.parametrize(("bits", "group_size"), [(8, -1), (4, 32)])
def test_experts_are_the_sum_that_they_stand_for(bits: int, group_size: int) -> None:
    (x, weights, chosen, *stacks, _, _, _, _), given = random_experts(
        9, 8, bits, group_size, 0, torch.float32
    )
    w13, w2 = (
        torch.stack(
            [
                reference.dequantize_weight(
                    codes[e], scale[e], None if groups is None else groups[e], bits
                )
                for e in range(EXPERTS)
            ]
        )
        for codes, scale, groups in stacks
    )
    gate, up = w13.chunk(2, dim=1)
    expected = torch.stack(
        [
            sum(
                w * (w2[e] @ (torch.nn.functional.silu(gate[e] @ row) * (up[e] @ row)))
                for w, e in zip(ws, es, strict=True)
            )
            for row, ws, es in zip(x, weights, chosen, strict=True)
        ]
    )
    got = ops.experts(*given[:8], 1.0, *given[9:])
    assert (got - expected).norm() < 0.02 * expected.norm()


def test_no_token_and_a_token_that_is_not_a_number() -> None:
    _, given = random_experts(3, 8, 4, -1, 96, torch.bfloat16)
    assert ops.experts(*(part[:0] for part in given[:3]), *given[3:]).shape == (0, HIDDEN)
    given[0][1, 5] = torch.nan
    got = ops.experts(*given)
    assert got[1].isnan().all()
    assert got[[0, 2]].isfinite().all()


def test_the_op_is_registered_as_torch_wants_it() -> None:
    _, given = random_experts(4, 8, 4, -1, 96, torch.float32)
    torch.library.opcheck(
        torch.ops.smoothrot.experts.default, given, test_utils=("test_schema", "test_faketensor")
    )


def test_experts_stay_one_call_in_a_compiled_graph() -> None:
    _, given = random_experts(6, 8, 4, -1, 96, torch.float32)
    compiled = torch.compile(
        lambda *arguments: ops.experts(*arguments) + 1, fullgraph=True, backend="eager"
    )
    assert torch.equal(compiled(*given), ops.experts(*given) + 1)


def test_a_stack_is_packed_as_its_members_are() -> None:
    for outputs, inputs, groups, bits in ((64, 96, None, 4), (40, 96, 3, 4), (33, 64, None, 8)):
        dtype, width = (torch.uint8, inputs // 2) if bits == 4 else (torch.int8, inputs)
        weight = torch.randint(0, 100, (3, outputs, width), dtype=dtype)
        scale, group_scale = torch.rand(3, outputs, 1), None
        if groups is not None:
            group_scale = torch.randint(1, 16, (3, outputs, groups), dtype=torch.uint8)
        members = [
            ops.prepack_weight(
                weight[e], scale[e], None if group_scale is None else group_scale[e], bits
            )
            for e in range(3)
        ]
        together = ops.prepack_weight(weight, scale, group_scale, bits)
        assert torch.equal(together, torch.stack(members))


CODES = torch.zeros(2, 4, 32, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("weight", "scale", "group_scale", "message"),
    [
        (CODES[:0], (0, 4, 1), None, r"weight: expected contiguous uint8 \(any, any\), got"),
        (CODES.char(), (2, 4, 1), None, r"weight: expected contiguous uint8 \(2, any, any\), got"),
        (CODES, (4, 1), None, r"weight_scale: expected contiguous float32 \(2, any, any\)"),
        (CODES, (3, 4, 1), None, r"weight_scale: expected contiguous float32 \(2, any"),
        (CODES, (2, 5, 1), None, r"weight_scale: expected a row for each of the 4 outputs"),
        (CODES, (2, 4, 2), None, r"weight_scale: expected contiguous float32 \(any, 1\)"),
        (CODES, (2, 4, 1), (4, 2), r"group_scale: expected contiguous uint8 \(2, any, any\)"),
        (CODES, (2, 4, 1), (1, 4, 2), r"group_scale: expected contiguous uint8 \(2, any, any\)"),
        (CODES, (2, 4, 1), (2, 5, 2), r"group_scale: expected contiguous uint8 \(4, any\)"),
        (CODES, (2, 4, 1), (2, 4, 4), r"group_size: .* got 16 of 4-bit weights"),
    ],
)
def test_a_stack_that_cannot_be_packed_is_refused(
    weight: torch.Tensor,
    scale: tuple[int, ...],
    group_scale: tuple[int, ...] | None,
    message: str,
) -> None:
    groups = None if group_scale is None else torch.ones(group_scale, dtype=torch.uint8)
    with pytest.raises(ConfigError, match=message):
        ops.prepack_weight(weight, torch.ones(scale), groups, 4)


def test_rows_of_no_tile_are_nan_and_senseless_tiles_compute_nothing() -> None:
    weight, scale = torch.full((2, 32, 32), 0x11, dtype=torch.uint8), torch.ones(2, 32, 1)
    packed, codes = ops.prepack_weight(weight, scale, None, 4), torch.ones(5, 64, dtype=torch.int8)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):

        def multiply(*tiles: tuple[int, int, int], dtype: torch.dtype = dtype) -> torch.Tensor:
            table = torch.tensor(tiles, dtype=torch.int32).view(-1, 3).T.contiguous()
            return torch.ops.smoothrot.gemm_experts(
                codes, torch.ones(5), packed, scale, None, table, dtype, 8, 4, -1
            )

        y = multiply((1, 3, 5), (0, 1, 2))
        assert (y[[1, 3, 4]] == 64).all()
        assert y[[0, 2]].isnan().all()
        assert (
            multiply((-1, 0, 5), (2, 0, 5), (0, -1, 2), (0, 0, 6), (1, 2, 2), (1, 3, 2))
            .isnan()
            .all()
        )
        assert multiply().isnan().all()


def test_a_tile_holds_so_many_tokens_at_most() -> None:
    weight, scale = torch.full((1, 32, 32), 0x11, dtype=torch.uint8), torch.ones(1, 32, 1)
    tokens = TILE_TOKENS + 1
    arguments = (
        torch.ones(tokens, 64, dtype=torch.int8),
        torch.ones(tokens),
        ops.prepack_weight(weight, scale, None, 4),
        scale,
        None,
    )
    y = torch.ops.smoothrot.gemm_experts(
        *arguments, torch.tensor([[0], [0], [tokens]]).int(), torch.float32, 8, 4, -1
    )
    assert (y[:-1] == 64).all()
    assert y[-1].isnan().all()


def test_rows_are_weighed_and_added_in_the_order_of_the_sources() -> None:
    rows = torch.tensor([[1e8, 1.0], [1.0, 2.0], [-1e8, 4.0]]).repeat(1, 300)
    sources, weights = (
        torch.tensor([[0, 1, 2], [0, 2, 1]]).int(),
        torch.tensor([[1.0, 1.0, 1.0], [1.0, 1.0, 3.0]]),
    )
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        got = torch.ops.smoothrot.combine_experts(rows, sources, weights, dtype)
        assert got.dtype == dtype
        # 1e8 + 1 is 1e8 in float32.
        assert torch.equal(got.float(), torch.tensor([[0.0, 7.0], [3.0, 11.0]]).repeat(1, 300))
    lost = torch.ops.smoothrot.combine_experts(
        rows, torch.tensor([[0, 3], [-1, 1], [1, 2]]).int(), torch.ones(3, 2), torch.float32
    )
    assert lost[:2].isnan().all()
    assert lost[2].isfinite().all()


GEMM_EXPERTS: dict[str, Any] = {
    "codes": torch.zeros(2, 64, dtype=torch.int8),
    "scale": torch.ones(2),
    "packed": torch.zeros(3, 2, 32 * (4 + 32), dtype=torch.uint8),
    "weight_scale": torch.ones(3, 40, 1),
    "bias": None,
    "tiles": torch.zeros(3, 1, dtype=torch.int32),
    "out_dtype": torch.float16,
    "act_bits": 8,
    "weight_bits": 4,
    "group_size": -1,
}
COMBINE_EXPERTS: dict[str, Any] = {
    "rows": torch.ones(4, 8),
    "sources": torch.zeros(2, 2, dtype=torch.int32),
    "weights": torch.ones(2, 2),
    "out_dtype": torch.float32,
}


@pytest.mark.parametrize(
    ("op", "changes", "message"),
    [
        ("gemm_experts", {"codes": torch.zeros(2, 64)}, r"codes: expected contiguous int8"),
        ("gemm_experts", {"scale": torch.ones(3)}, r"scale: expected contiguous float32 \(2\)"),
        (
            "gemm_experts",
            {"packed": torch.zeros(0, 2, 4)},
            r"packed: expected \(experts, panels, bytes\), got",
        ),
        (
            "gemm_experts",
            {"packed": torch.zeros(3, 2, 1, dtype=torch.uint8)},
            r"packed: expected .*\(2, 1152\)",
        ),
        (
            "gemm_experts",
            {"weight_scale": torch.ones(2, 40, 1)},
            r"weight_scale: expected .*\(3, any, any\)",
        ),
        (
            "gemm_experts",
            {"weight_scale": torch.ones(3, 40, 2)},
            r"weight_scale: expected .*\(any, 1\)",
        ),
        (
            "gemm_experts",
            {"bias": torch.ones(3, 39)},
            r"bias: expected contiguous float32 \(3, 40\), got",
        ),
        (
            "gemm_experts",
            {"bias": torch.ones(3, 40).double()},
            r"bias: expected float32, bfloat16 or float16, got float64",
        ),
        ("gemm_experts", {"group_size": 32}, r"packed: expected .*\(2, 1216\), got .*\(2, 1152\)"),
        (
            "gemm_experts",
            {"group_size": 16},
            r"group_size: expected -1 or, .* got 16 of 4-bit weights",
        ),
        (
            "gemm_experts",
            {"tiles": torch.zeros(3, 1)},
            r"tiles: expected contiguous int32 \(3, any\)",
        ),
        (
            "gemm_experts",
            {"out_dtype": torch.int32},
            r"out_dtype: expected float32, bfloat16 or float16",
        ),
        ("gemm_experts", {"act_bits": 2}, r"act_bits: expected 4 or 8, got 2"),
        ("gemm_experts", {"weight_bits": 3}, r"weight_bits: expected 4 or 8, got 3"),
        (
            "combine_experts",
            {"rows": torch.ones(4, 8).half()},
            r"rows: expected contiguous float32",
        ),
        ("combine_experts", {"rows": torch.ones(4, 0)}, r"rows: expected at least one output"),
        ("combine_experts", {"sources": torch.zeros(2, 2)}, r"sources: expected contiguous int32"),
        (
            "combine_experts",
            {"sources": torch.zeros(2, 0).int(), "weights": torch.ones(2, 0)},
            r"sources: expected at least one source",
        ),
        (
            "combine_experts",
            {"weights": torch.ones(2, 3)},
            r"weights: expected contiguous float32 \(2, 2\)",
        ),
    ],
)
def test_a_wrong_argument_of_what_the_op_calls_is_named(
    op: str, changes: dict[str, Any], message: str
) -> None:
    given = {"gemm_experts": GEMM_EXPERTS, "combine_experts": COMBINE_EXPERTS}[op]
    with pytest.raises(RuntimeError, match=f"smoothrot::{op}: {message}"):
        getattr(torch.ops.smoothrot, op)(*(given | changes).values())


def test_the_op_prepares_the_rotation_and_names_what_is_wrong(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[Any] = []
    _, given = random_experts(3, 8, 4, -1, 96, torch.float32)
    monkeypatch.setattr(ops, "prepare_rotation", lambda *arguments: asked.append(arguments))
    monkeypatch.setattr(ops, "grouped_experts", lambda library, x, *arguments: x + 1)
    assert torch.equal(ops.experts(*given), given[0] + 1)
    assert asked == [(96, torch.device("cpu"))]

    def refuse(*_: Any) -> None:
        raise RuntimeError("smoothrot::gemm_experts: tiles: expected something else")

    monkeypatch.setattr(ops, "grouped_experts", refuse)
    with pytest.raises(ConfigError, match="gemm_experts: tiles"):
        ops.experts(*given)


def test_a_graph_of_a_gpu_learns_the_shape_without_one() -> None:
    with FakeTensorMode():
        x, weights = (
            torch.empty(7, 64, dtype=torch.bfloat16, device="cuda"),
            torch.empty(7, 2, device="cuda"),
        )
        chosen = torch.empty(7, 2, dtype=torch.int32, device="cuda")
        w13, w2 = (
            torch.empty(4, *shape, dtype=torch.uint8, device="cuda")
            for shape in ((192, 32), (64, 48))
        )
        scales = [torch.empty(4, rows, 1, device="cuda") for rows in (192, 64)]
        y = ops.experts(x, weights, chosen, w13, scales[0], w2, scales[1], 96, 0.9, 8, 4, -1)
    assert (y.shape, y.dtype, y.device.type) == ((7, 64), torch.bfloat16, "cuda")


@pytest.mark.parametrize(
    ("tokens", "top_k", "experts"),
    [(0, 2, 4), (1, 1, 1), (1, 8, 128), (3, 2, 4), (200, 2, 3), (129, 1, 2)],
)
def test_the_route_sends_each_token_to_its_experts(tokens: int, top_k: int, experts: int) -> None:
    chosen = (
        torch.rand(tokens, experts, generator=torch.Generator().manual_seed(tokens))
        .topk(top_k)
        .indices
    )
    route = Route.of(chosen.int(), experts)
    assert route.tiles.shape == (3, most_tiles(tokens * top_k, experts))
    seen = torch.full((tokens * top_k,), -1)
    for expert, first, end in route.tiles.T.tolist():
        if first < end:
            rows = slice(first, min(first + TILE_TOKENS, end))
            assert (seen[rows] == -1).all()
            seen[rows] = expert
            assert (chosen[route.token[first:end]] == expert).any(dim=1).all()
    assert (seen >= 0).all()
    # Each token's rows in the order of its experts, each weighed by its own slot.
    assert torch.equal(seen[route.sources.long()], chosen.sort(dim=1).values)
    assert torch.equal(chosen.gather(1, route.slots), chosen.sort(dim=1).values)
    assert torch.equal(
        route.token[route.sources.long()], torch.arange(tokens)[:, None].expand(-1, top_k)
    )


def test_the_fullest_table_has_no_surplus_tile() -> None:
    """The bound is reached: every expert but one has a single row."""
    chosen = torch.cat([torch.arange(5), torch.zeros(TILE_TOKENS, dtype=torch.long)])[:, None]
    route = Route.of(chosen, 5)
    assert (route.tiles[1] < route.tiles[2]).all()


def test_rows_of_no_expert_are_in_no_tile() -> None:
    route = Route.of(torch.tensor([[0, 7], [-1, 1]]), 2)
    used = [tile for tile in route.tiles.T.tolist() if tile[1] < tile[2]]
    assert [(expert, route.token[first:end].tolist()) for expert, first, end in used] == [
        (0, [0]),
        (1, [1]),
    ]
