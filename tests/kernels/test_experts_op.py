# SPDX-License-Identifier: Apache-2.0
"""``ops.experts`` against its definition, and under torch.compile."""

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
    tokens: int, act_bits: int, weight_bits: int, groups: int, block: int, dtype: torch.dtype
) -> tuple[Arguments, Arguments]:
    """Arguments of the reference and of the op; no token goes to expert 3."""
    generator = torch.Generator().manual_seed(tokens)
    x = torch.randn(tokens, HIDDEN, generator=generator).to(dtype)
    logits = torch.randn(tokens, EXPERTS, generator=generator)
    logits[:, 3] = -torch.inf
    weights, chosen = logits.softmax(-1).topk(TOP_K)
    top = reference.quant_max(weight_bits)
    stored, packed = [], []
    for rows, inputs in ((2 * INTERMEDIATE, HIDDEN), (HIDDEN, INTERMEDIATE)):
        codes = torch.randint(-top - 1, top + 1, (EXPERTS, rows, inputs), generator=generator, dtype=torch.int8)
        encoded = reference.encode(codes, weight_bits)
        scale = (torch.rand(EXPERTS, rows, groups, generator=generator) + 0.5) / (top * inputs**0.5)
        stored += [encoded, scale]
        packed += [torch.stack([ops.prepack_weight(*one, weight_bits) for one in zip(encoded, scale, strict=True)]), scale]
    numbers = (block, 0.9, act_bits, weight_bits)
    chosen = chosen.to(torch.int32)
    return (x, weights, chosen, tuple(stored[:2]), tuple(stored[2:]), *numbers), (x, weights, chosen, *packed, *numbers)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [1, 13])
@pytest.mark.parametrize(
    ("act_bits", "weight_bits", "groups", "block"), [(4, 4, 1, 96), (8, 4, 2, 48), (8, 8, 1, 0), (4, 4, 2, 0)]
)
def test_experts_equal_the_reference(
    tokens: int, act_bits: int, weight_bits: int, groups: int, block: int, dtype: torch.dtype
) -> None:
    defined, given = random_experts(tokens, act_bits, weight_bits, groups, block, dtype)
    expected, got = reference.experts(*defined), ops.experts(*given)
    assert got.dtype == dtype
    # All that may differ are the last bits of float sums over groups, and what they move across a tie.
    assert (got.float() - expected.float()).norm() <= 2e-3 * expected.float().norm()
    assert (got == expected).float().mean() > 0.9


def test_experts_are_the_sum_that_they_stand_for() -> None:
    (x, weights, chosen, (w13, w13_scale), (w2, w2_scale), *_), given = random_experts(9, 8, 8, 1, 0, torch.float32)
    gate, up = reference.dequantize_weight(w13.flatten(0, 1), w13_scale.flatten(0, 1), 8).view(EXPERTS, 2, -1, HIDDEN).unbind(1)
    down = reference.dequantize_weight(w2.flatten(0, 1), w2_scale.flatten(0, 1), 8).view(EXPERTS, HIDDEN, -1)
    expected = torch.stack(
        [
            sum(w * (down[e] @ (torch.nn.functional.silu(gate[e] @ row) * (up[e] @ row))) for w, e in zip(ws, es, strict=True))
            for row, ws, es in zip(x, weights, chosen, strict=True)
        ]
    )
    got = ops.experts(*given[:8], 1.0, *given[9:])
    assert (got - expected).norm() < 0.02 * expected.norm()


def test_no_token_and_a_token_that_is_not_a_number() -> None:
    _, given = random_experts(3, 8, 4, 1, 96, torch.bfloat16)
    assert ops.experts(*(part[:0] for part in given[:3]), *given[3:]).shape == (0, HIDDEN)
    given[0][1, 5] = torch.nan
    got = ops.experts(*given)
    assert got[1].isnan().all()
    assert got[[0, 2]].isfinite().all()


def test_the_op_is_registered_as_torch_wants_it() -> None:
    _, given = random_experts(4, 8, 4, 1, 96, torch.float32)
    torch.library.opcheck(torch.ops.smoothrot.experts.default, given, test_utils=("test_schema", "test_faketensor"))


def test_experts_stay_one_call_in_a_compiled_graph() -> None:
    _, given = random_experts(6, 8, 4, 1, 96, torch.float32)
    compiled = torch.compile(lambda *arguments: ops.experts(*arguments) + 1, fullgraph=True, backend="eager")
    assert torch.equal(compiled(*given), ops.experts(*given) + 1)


def test_on_a_gpu_the_op_prepares_the_rotation_and_runs_the_grouped_route(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel that torch has for CUDA, called without one; tests/cuda executes the route on emulated ops."""
    assert torch._C._dispatch_has_kernel_for_dispatch_key("smoothrot::experts", "CUDA")
    asked: list[Any] = []
    _, given = random_experts(3, 8, 4, 1, 96, torch.float32)
    monkeypatch.setattr(ops, "prepare_rotation", lambda *arguments: asked.append(arguments))
    monkeypatch.setattr(ops, "grouped_experts", lambda library, *arguments: arguments[0])
    assert ops._experts_cuda(*given) is given[0]
    assert asked == [(96, torch.device("cpu"))]

    def refuse(*_: Any) -> None:
        raise RuntimeError("smoothrot::gemm_experts: tiles: expected something else")

    monkeypatch.setattr(ops, "grouped_experts", refuse)
    with pytest.raises(ConfigError, match="gemm_experts: tiles"):
        ops._experts_cuda(*given)


def test_a_graph_of_a_gpu_learns_the_shape_without_one() -> None:
    with FakeTensorMode():
        x, weights = torch.empty(7, 64, dtype=torch.bfloat16, device="cuda"), torch.empty(7, 2, device="cuda")
        chosen = torch.empty(7, 2, dtype=torch.int32, device="cuda")
        w13, w2 = (torch.empty(4, *shape, dtype=torch.uint8, device="cuda") for shape in ((192, 32), (64, 48)))
        scales = [torch.empty(4, rows, 1, device="cuda") for rows in (192, 64)]
        y = ops.experts(x, weights, chosen, w13, scales[0], w2, scales[1], 96, 0.9, 8, 4)
    assert (y.shape, y.dtype, y.device.type) == ((7, 64), torch.bfloat16, "cuda")


@pytest.mark.parametrize(("tokens", "top_k", "experts"), [(0, 2, 4), (1, 1, 1), (1, 8, 128), (3, 2, 4), (200, 2, 3), (129, 1, 2)])
def test_the_route_sends_each_token_to_its_experts(tokens: int, top_k: int, experts: int) -> None:
    chosen = torch.rand(tokens, experts, generator=torch.Generator().manual_seed(tokens)).topk(top_k).indices
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
    assert torch.equal(route.token[route.sources.long()], torch.arange(tokens)[:, None].expand(-1, top_k))


def test_the_fullest_table_has_no_surplus_tile() -> None:
    """The bound is reached: every expert but one has a single row."""
    chosen = torch.cat([torch.arange(5), torch.zeros(TILE_TOKENS, dtype=torch.long)])[:, None]
    route = Route.of(chosen, 5)
    assert (route.tiles[1] < route.tiles[2]).all()


def test_rows_of_no_expert_are_in_no_tile() -> None:
    route = Route.of(torch.tensor([[0, 7], [-1, 1]]), 2)
    used = [tile for tile in route.tiles.T.tolist() if tile[1] < tile[2]]
    assert [(expert, route.token[first:end].tolist()) for expert, first, end in used] == [(0, [0]), (1, [1])]
