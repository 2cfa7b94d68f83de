# SPDX-License-Identifier: Apache-2.0
"""``ops.experts`` against its definition, and under torch.compile."""

from typing import Any

import pytest
import torch

from smoothrot_vllm import ops, reference

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
