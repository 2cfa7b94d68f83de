# SPDX-License-Identifier: Apache-2.0
"""gemm: exact integer sums on every path and shape, an epilogue as good as torch's, and the same
bits everywhere."""

import pytest
import torch

from smoothrot_vllm import ops, reference
from smoothrot_vllm.errors import ConfigError

# Tile heights around each path's tallest, ragged columns and inputs, more than one block of tiles.
SHAPES = [
    (1, 1, 2),
    (1, 257, 130),
    (2, 13, 26),
    (3, 32, 64),
    (4, 33, 70),
    (5, 26, 514),
    (13, 100, 36),
    (14, 64, 2048),
    (15, 48, 8),
    (29, 31, 258),
    (130, 40, 4096),
    # Every height of a tile, with the fewest and with more steps after the last whole vector of
    # them.
    *((tokens, 3, inputs) for tokens in range(2, 15) for inputs in (80, 148)),
]
GROUPED = [
    (1, 33, 128, 4),
    (7, 64, 256, 2),
    (8, 40, 2048, 64),
    (29, 17, 384, 3),
    (3, 5, 20, 2),
    (2, 6, 36, 6),
]


def codes_of(shape: tuple[int, int], bits: int) -> torch.Tensor:
    return torch.randint(-(1 << bits - 1), 1 << bits - 1, shape, dtype=torch.int8)


def integer_sums(
    codes: torch.Tensor, weight: torch.Tensor, act_bits: int, weight_bits: int
) -> torch.Tensor:
    """gemm with unit scales: float32 holds the sums of these tests exactly."""
    tokens, columns = codes.shape[0], weight.shape[0]
    unit = torch.ones(columns, 1)
    packed = ops.prepack_weight(weight, unit, weight_bits)
    return ops.gemm(
        codes, torch.ones(tokens), packed, unit, None, torch.float32, act_bits, weight_bits
    )


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize(("tokens", "columns", "inputs"), SHAPES)
@pytest.mark.parametrize("act_bits", [4, 8])
@pytest.mark.parametrize("weight_bits", [4, 8])
def test_integer_sums_are_exact(
    tokens: int, columns: int, inputs: int, act_bits: int, weight_bits: int
) -> None:
    codes = reference.encode(codes_of((tokens, inputs), act_bits), act_bits)
    weight = reference.encode(codes_of((columns, inputs), weight_bits), weight_bits)
    expected = reference.accumulate(codes, weight, act_bits, weight_bits)[0]
    assert expected.abs().max() < 1 << 24
    assert torch.equal(integer_sums(codes, weight, act_bits, weight_bits).int(), expected)


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("act_bits", [4, 8])
@pytest.mark.parametrize("weight_bits", [4, 8])
@pytest.mark.parametrize(("act_end", "weight_end"), [(-1, -1), (-1, 1), (1, -1), (1, 1)])
def test_integer_sums_of_extreme_codes_do_not_saturate(
    act_bits: int, weight_bits: int, act_end: int, weight_end: int
) -> None:
    def end(bits: int, sign: int) -> int:
        return -(1 << bits - 1) if sign < 0 else (1 << bits - 1) - 1

    a, w, inputs = end(act_bits, act_end), end(weight_bits, weight_end), 1024
    codes = reference.encode(torch.full((3, inputs), a, dtype=torch.int8), act_bits)
    weight = reference.encode(torch.full((32, inputs), w, dtype=torch.int8), weight_bits)
    assert torch.equal(
        integer_sums(codes, weight, act_bits, weight_bits),
        torch.full((3, 32), float(a * w * inputs)),
    )


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize(("act_bits", "weight_bits"), [(4, 4), (8, 4), (8, 8)])
def test_each_group_sums_exactly(act_bits: int, weight_bits: int) -> None:
    for tokens, columns, inputs, groups in GROUPED:
        codes = reference.encode(codes_of((tokens, inputs), act_bits), act_bits)
        weight = reference.encode(codes_of((columns, inputs), weight_bits), weight_bits)
        sums = reference.accumulate(codes, weight, act_bits, weight_bits, inputs // groups)
        for group in range(groups):
            only = torch.zeros(columns, groups)
            only[:, group] = 1.0
            packed = ops.prepack_weight(weight, only, weight_bits)
            y = ops.gemm(
                codes, torch.ones(tokens), packed, only, None, torch.float32, act_bits, weight_bits
            )
            assert torch.equal(y.int(), sums[group])


def quantized_problem(
    tokens: int, columns: int, inputs: int, groups: int, weight_bits: int
) -> dict[str, torch.Tensor]:
    codes, scale = reference.quant(torch.randn(tokens, inputs), 0.9, 8)
    weight = reference.encode(codes_of((columns, inputs), weight_bits), weight_bits)
    return {
        "codes": codes,
        "scale": scale,
        "weight": weight,
        "weight_scale": torch.rand(columns, groups) * 0.01 + 0.001,
        "bias": torch.randn(columns),
    }


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("out_dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("groups", [1, 16])
@pytest.mark.parametrize("with_bias", [False, True])
def test_error_is_at_most_twice_that_of_torch_in_the_same_dtype(
    out_dtype: torch.dtype, groups: int, with_bias: bool
) -> None:
    p = quantized_problem(33, 70, 512, groups, 4)
    bias = p["bias"].to(out_dtype) if with_bias else None
    packed = ops.prepack_weight(p["weight"], p["weight_scale"], 4)
    ours = ops.gemm(p["codes"], p["scale"], packed, p["weight_scale"], bias, out_dtype, 8, 4)
    x = p["codes"].double() * p["scale"].double()[:, None]
    size = 512 // groups
    w = reference.decode(p["weight"], 4).double() * p["weight_scale"].double().repeat_interleave(
        size, dim=1
    )
    exact = torch.nn.functional.linear(x, w, None if bias is None else bias.double())
    theirs = torch.nn.functional.linear(x.to(out_dtype), w.to(out_dtype), bias)
    assert (ours.double() - exact).abs().max() <= 2 * (theirs.double() - exact).abs().max()


@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("weight_bits", [4, 8])
@pytest.mark.parametrize("out_dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_output_per_channel_is_the_reference_bit_for_bit(
    isa: str, groups: int, weight_bits: int, out_dtype: torch.dtype
) -> None:
    p = quantized_problem(17, 45, 264, groups, weight_bits)
    packed = ops.prepack_weight(p["weight"], p["weight_scale"], weight_bits)
    y = ops.gemm(
        p["codes"], p["scale"], packed, p["weight_scale"], p["bias"], out_dtype, 8, weight_bits
    )
    sums = reference.accumulate(p["codes"], p["weight"], 8, weight_bits, 264 // groups).float()
    expected = sums[0] * p["weight_scale"][:, 0]
    for group in range(1, groups):
        expected = expected + sums[group] * p["weight_scale"][:, group]
    assert torch.equal(y, (expected * p["scale"][:, None] + p["bias"]).to(out_dtype)), isa


@pytest.mark.usefixtures("isa")
def test_output_overflow_and_nan_follow_torch() -> None:
    codes = torch.full((3, 64), 100, dtype=torch.int8)
    scale = torch.tensor([1.0, float("nan"), 1e30])
    unit = torch.ones(40, 1)
    packed = ops.prepack_weight(torch.full((40, 64), 100, dtype=torch.int8), unit, 8)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        y = ops.gemm(codes, scale, packed, unit, None, dtype, 8, 8)
        expected = (640000.0 * scale).to(dtype)[:, None].expand(3, 40)
        torch.testing.assert_close(y, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("bias_dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_bias_may_have_any_float_dtype(bias_dtype: torch.dtype) -> None:
    p = quantized_problem(2, 37, 64, 1, 4)
    packed = ops.prepack_weight(p["weight"], p["weight_scale"], 4)
    bias = p["bias"].to(bias_dtype)
    args = (p["codes"], p["scale"], packed, p["weight_scale"])
    plain = ops.gemm(*args, None, torch.float32, 8, 4)
    assert torch.equal(ops.gemm(*args, bias, torch.float32, 8, 4), plain + bias.float())


def test_no_tokens_give_an_empty_output() -> None:
    p = quantized_problem(1, 37, 64, 1, 4)
    packed = ops.prepack_weight(p["weight"], p["weight_scale"], 4)
    y = ops.gemm(
        p["codes"][:0], p["scale"][:0], packed, p["weight_scale"], None, torch.bfloat16, 8, 4
    )
    assert y.shape == (0, 37)
    assert y.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"codes": torch.zeros(2, 32, dtype=torch.uint8)},
            r"codes: expected contiguous int8 \(any, any\), got uint8 \(2, 32\)",
        ),
        ({"scale": torch.ones(3)}, r"scale: expected contiguous float32 \(2\), got float32 \(3\)"),
        (
            {"scale": torch.ones(2, dtype=torch.float64)},
            r"scale: expected contiguous float32 \(2\), got float64 \(2\)",
        ),
        (
            {"weight_scale": torch.ones(37, 3)},
            r"weight_scale: .*groups dividing the 64 inputs, got float32 \(37, 3\)",
        ),
        (
            {"weight_scale": torch.ones(70, 1)},
            r"packed: expected contiguous uint8 \(3, 1152\), got uint8 \(2, 1152\)",
        ),
        ({"bias": torch.ones(36)}, r"bias: expected contiguous float32 \(37\), got float32 \(36\)"),
        (
            {"bias": torch.ones(37, dtype=torch.int32)},
            "bias: expected float32, bfloat16 or float16, got int32",
        ),
        ({"out_dtype": torch.int8}, "out_dtype: expected float32, bfloat16 or float16, got int8"),
        ({"act_bits": 5}, "act_bits: expected 4 or 8, got 5"),
        ({"weight_bits": 2}, "weight_bits: expected 4 or 8, got 2"),
        (
            {"weight_bits": 8},
            r"packed: expected contiguous uint8 \(2, 2176\), got uint8 \(2, 1152\)",
        ),
    ],
)
def test_a_wrong_argument_is_named(change: dict[str, object], message: str) -> None:
    unit = torch.ones(37, 1)
    arguments: dict[str, object] = {
        "codes": torch.zeros(2, 64, dtype=torch.int8),
        "scale": torch.ones(2),
        "packed": ops.prepack_weight(torch.zeros(37, 32, dtype=torch.uint8), unit, 4),
        "weight_scale": unit,
        "bias": None,
        "out_dtype": torch.float32,
        "act_bits": 8,
        "weight_bits": 4,
    }
    with pytest.raises(ConfigError, match=message):
        ops.gemm(**(arguments | change))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("weight", "scale", "bits", "message"),
    [
        (
            torch.zeros(4, 8, dtype=torch.int8),
            torch.ones(4, 1),
            4,
            r"weight: expected contiguous uint8 .* got int8 \(4, 8\)",
        ),
        (
            torch.zeros(4, 7, dtype=torch.int8),
            torch.ones(4, 1),
            8,
            "weight: expected an even number of inputs",
        ),
        (
            torch.zeros(4, 8, dtype=torch.int8),
            torch.ones(3, 1),
            8,
            "weight_scale: expected a row for each of the 4 outputs",
        ),
        (
            torch.zeros(4, 8, dtype=torch.int8),
            torch.ones(4),
            8,
            r"weight_scale: expected contiguous float32 \(any, any\)",
        ),
        (torch.zeros(8, 4, dtype=torch.int8).T, torch.ones(4, 1), 8, "weight: .*not contiguous"),
        (
            torch.zeros(1, 1 << 24, dtype=torch.int8),
            torch.ones(1, 1),
            8,
            "weight_scale: expected groups short enough",
        ),
    ],
)
def test_prepack_weight_names_a_wrong_argument(
    weight: torch.Tensor, scale: torch.Tensor, bits: int, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        ops.prepack_weight(weight, scale, bits)
