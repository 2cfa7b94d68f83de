# SPDX-License-Identifier: Apache-2.0
"""gemm: exact integer sums on every path and shape, an epilogue as good as torch's, and the same
bits everywhere."""

from typing import Any

import pytest
import torch

from smoothrot_vllm import ops, reference
from smoothrot_vllm.errors import ConfigError

# Tile heights around each path's tallest (4 portable, 6 AVX2, 14 AVX-512), ragged columns and
# inputs, more than one block of tiles.
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
    # As many tiles as from which 4-bit panels are expanded to bytes (4 on AVX2, 3 on AVX-512), 2048
    # inputs at a time: whole chunks, and after them no whole span of 32 inputs, no whole step of 4.
    *((tokens, 35, inputs) for tokens in (18, 19, 28, 29, 43) for inputs in (30, 2048, 4128, 4138)),
    (470, 35, 4270),  # several blocks on every path
]
# Tokens, columns, groups; odd groups leave half of a stored byte and a part of a chunk.
GROUPED = [
    *((tokens, 33, 3) for tokens in range(1, 16)),
    (1, 257, 8),
    (2, 64, 1),
    (3, 31, 17),
    # As many inputs as from which AVX-512 sums one or two rows by groups.
    *((tokens, 33, groups) for tokens in (1, 2, 3) for groups in (64, 65)),
    (19, 35, 5),
    (29, 48, 33),
    (43, 17, 65),
    (470, 35, 133),
]


def codes_of(shape: tuple[int, int], bits: int) -> torch.Tensor:
    return torch.randint(-(1 << bits - 1), 1 << bits - 1, shape, dtype=torch.int8)


def group_scales_of(columns: int, groups: int) -> torch.Tensor:
    return torch.randint(1, 16, (columns, groups), dtype=torch.uint8)


def integer_sums(
    codes: torch.Tensor,
    weight: torch.Tensor,
    group_scale: torch.Tensor | None,
    act_bits: int,
    weight_bits: int,
) -> torch.Tensor:
    """gemm with unit scales: float32 holds sums up to 2 ** 24 exactly."""
    tokens, inputs = reference.decode(codes, act_bits).shape
    unit = torch.ones(len(weight), 1)
    packed = ops.prepack_weight(weight, unit, group_scale, weight_bits)
    group_size = -1 if group_scale is None else inputs // group_scale.shape[1]
    numbers = (act_bits, weight_bits, group_size)
    y = ops.gemm(codes, torch.ones(tokens), packed, unit, None, torch.float32, *numbers)
    assert y.abs().max() <= 1 << 24
    return y.int()


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize(("tokens", "columns", "inputs"), SHAPES)
@pytest.mark.parametrize("act_bits", [4, 8])
@pytest.mark.parametrize("weight_bits", [4, 8])
def test_integer_sums_are_exact(
    tokens: int, columns: int, inputs: int, act_bits: int, weight_bits: int
) -> None:
    codes = reference.encode(codes_of((tokens, inputs), act_bits), act_bits)
    weight = reference.encode(codes_of((columns, inputs), weight_bits), weight_bits)
    expected = reference.accumulate(codes, weight, None, act_bits, weight_bits)
    assert torch.equal(integer_sums(codes, weight, None, act_bits, weight_bits), expected)


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize(("tokens", "columns", "groups"), GROUPED)
@pytest.mark.parametrize("group_size", [32, 64, 128])
@pytest.mark.parametrize("act_bits", [4, 8])
def test_integer_sums_of_scaled_groups_are_exact(
    tokens: int, columns: int, groups: int, group_size: int, act_bits: int
) -> None:
    inputs = groups * group_size
    codes = reference.encode(codes_of((tokens, inputs), act_bits), act_bits)
    weight = reference.encode(codes_of((columns, inputs), 4), 4)
    group_scale = group_scales_of(columns, groups)
    expected = reference.accumulate(codes, weight, group_scale, act_bits, 4)
    assert torch.equal(integer_sums(codes, weight, group_scale, act_bits, 4), expected)


def extreme(bits: int, sign: int) -> int:
    return -(1 << bits - 1) if sign < 0 else (1 << bits - 1) - 1


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("act_bits", [4, 8])
@pytest.mark.parametrize(
    ("weight_bits", "group_size"), [(4, -1), (4, 32), (4, 64), (4, 128), (8, -1)]
)
@pytest.mark.parametrize(("act_end", "weight_end"), [(-1, -1), (-1, 1), (1, -1), (1, 1)])
@pytest.mark.parametrize("tokens", [1, 3, 14, 50])
def test_integer_sums_of_extreme_codes_do_not_saturate(
    act_bits: int, weight_bits: int, group_size: int, act_end: int, weight_end: int, tokens: int
) -> None:
    a, w, inputs = extreme(act_bits, act_end), extreme(weight_bits, weight_end), 1024
    codes = reference.encode(torch.full((tokens, inputs), a, dtype=torch.int8), act_bits)
    weight = reference.encode(torch.full((33, inputs), w, dtype=torch.int8), weight_bits)
    g, group_scale = 1, None
    if group_size != -1:
        g, group_scale = 15, torch.full((33, inputs // group_size), 15, dtype=torch.uint8)
    got = integer_sums(codes, weight, group_scale, act_bits, weight_bits)
    assert torch.equal(got, torch.full((tokens, 33), a * w * g * inputs, dtype=torch.int32))


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("tokens", [1, 5, 50])
@pytest.mark.parametrize(("bits", "g", "inputs"), [(4, 15, 139776), (8, 1, 131070)])
def test_the_largest_sums_do_not_overflow(tokens: int, bits: int, g: int, inputs: int) -> None:
    """The most inputs that the ops accept, all products of one sign."""
    codes = torch.full((tokens, inputs), -128, dtype=torch.int8)
    codes[tokens // 2] = 127
    weight = reference.encode(torch.full((3, inputs), extreme(bits, -1), dtype=torch.int8), bits)
    group_scale = torch.full((3, inputs // 128), g, dtype=torch.uint8) if g > 1 else None
    unit = torch.ones(3, 1)
    packed = ops.prepack_weight(weight, unit, group_scale, bits)
    group_size = 128 if g > 1 else -1
    scale = torch.ones(tokens)
    y = ops.gemm(codes, scale, packed, unit, None, torch.float32, 8, bits, group_size)
    exact = torch.full((tokens, 3), -128 * extreme(bits, -1) * g * inputs, dtype=torch.float64)
    exact[tokens // 2] = 127 * extreme(bits, -1) * g * inputs
    assert exact.abs().max() > 0.99 * (1 << 31)
    assert torch.equal(y, exact.float())


def quantized_problem(
    tokens: int, columns: int, inputs: int, group_size: int, weight_bits: int
) -> dict[str, Any]:
    codes, scale = reference.quant(torch.randn(tokens, inputs), 0.9, 8)
    weight = reference.encode(codes_of((columns, inputs), weight_bits), weight_bits)
    groups = None if group_size == -1 else group_scales_of(columns, inputs // group_size)
    return {
        "codes": codes,
        "scale": scale,
        "weight": weight,
        "weight_scale": torch.rand(columns, 1) * 0.01 + 0.001,
        "group_scale": groups,
        "bias": torch.randn(columns),
    }


def pack(p: dict[str, Any], weight_bits: int) -> torch.Tensor:
    return ops.prepack_weight(p["weight"], p["weight_scale"], p["group_scale"], weight_bits)


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("out_dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("group_size", [-1, 32])
@pytest.mark.parametrize("with_bias", [False, True])
def test_error_is_at_most_twice_that_of_torch_in_the_same_dtype(
    out_dtype: torch.dtype, group_size: int, with_bias: bool
) -> None:
    p = quantized_problem(33, 70, 512, group_size, 4)
    bias = p["bias"].to(out_dtype) if with_bias else None
    packed, numbers = pack(p, 4), (8, 4, group_size)
    ours = ops.gemm(p["codes"], p["scale"], packed, p["weight_scale"], bias, out_dtype, *numbers)
    x = p["codes"].double() * p["scale"].double()[:, None]
    units = reference.scaled_codes(p["weight"], p["group_scale"], 4)
    w = units.double() * p["weight_scale"].double()
    exact = torch.nn.functional.linear(x, w, None if bias is None else bias.double())
    theirs = torch.nn.functional.linear(x.to(out_dtype), w.to(out_dtype), bias)
    assert (ours.double() - exact).abs().max() <= 2 * (theirs.double() - exact).abs().max()


@pytest.mark.parametrize(
    ("weight_bits", "group_size", "inputs"),
    [(4, -1, 264), (8, -1, 264), (4, 32, 288), (4, 64, 320), (4, 128, 1152)],
)
@pytest.mark.parametrize("tokens", [1, 4, 17, 61])
@pytest.mark.parametrize("out_dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("with_bias", [False, True])
def test_output_is_the_reference_bit_for_bit(
    isa: str,
    weight_bits: int,
    group_size: int,
    inputs: int,
    tokens: int,
    out_dtype: torch.dtype,
    with_bias: bool,
) -> None:
    p = quantized_problem(tokens, 45, inputs, group_size, weight_bits)
    if not with_bias:
        p["bias"] = None
    expected = reference.gemm(**p, out_dtype=out_dtype, act_bits=8, weight_bits=weight_bits)
    arguments = (p["codes"], p["scale"], pack(p, weight_bits), p["weight_scale"], p["bias"])
    y = ops.gemm(*arguments, out_dtype, 8, weight_bits, group_size)
    assert torch.equal(y, expected), isa


@pytest.mark.parametrize("groups", [1, 2, 5])
def test_group_scales_as_stored_are_those_that_prepack_takes(groups: int) -> None:
    """With an odd number of them half of a byte is cut off, which must not leave a view."""
    weight = reference.encode(codes_of((40, groups * 32), 4), 4)
    group_scale, scale = group_scales_of(40, groups), torch.rand(40, 1)
    unpacked = reference.unpack_group_scale(reference.pack_group_scale(group_scale), groups)
    assert torch.equal(
        ops.prepack_weight(weight, scale, unpacked, 4),
        ops.prepack_weight(weight, scale, group_scale, 4),
    )


@pytest.mark.usefixtures("isa")
def test_output_overflow_and_nan_follow_torch() -> None:
    codes = torch.full((3, 64), 100, dtype=torch.int8)
    scale = torch.tensor([1.0, float("nan"), 1e30])
    unit = torch.ones(40, 1)
    packed = ops.prepack_weight(torch.full((40, 64), 100, dtype=torch.int8), unit, None, 8)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        y = ops.gemm(codes, scale, packed, unit, None, dtype, 8, 8, -1)
        expected = (640000.0 * scale).to(dtype)[:, None].expand(3, 40)
        torch.testing.assert_close(y, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("bias_dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_bias_may_have_any_float_dtype(bias_dtype: torch.dtype) -> None:
    p = quantized_problem(2, 37, 64, -1, 4)
    packed = pack(p, 4)
    bias = p["bias"].to(bias_dtype)
    args = (p["codes"], p["scale"], packed, p["weight_scale"])
    plain = ops.gemm(*args, None, torch.float32, 8, 4, -1)
    assert torch.equal(ops.gemm(*args, bias, torch.float32, 8, 4, -1), plain + bias.float())


def test_no_tokens_give_an_empty_output() -> None:
    p = quantized_problem(1, 37, 64, 32, 4)
    packed = pack(p, 4)
    y = ops.gemm(
        p["codes"][:0], p["scale"][:0], packed, p["weight_scale"], None, torch.bfloat16, 8, 4, 32
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
            {"weight_scale": torch.ones(37, 2)},
            r"weight_scale: expected contiguous float32 \(any, 1\), got float32 \(37, 2\)",
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
        *(
            ({"group_size": size}, f"group_size: .*dividing the 64 inputs, got {size} of 4-bit")
            for size in (16, 128, 48, 1, 0, -2, -32)
        ),
        (
            {"group_size": 32, "weight_bits": 8},
            "group_size: expected -1 or, of 4-bit weights, .* got 32 of 8-bit weights",
        ),
        (
            {"group_size": 32},
            r"packed: expected contiguous uint8 \(2, 1216\), got uint8 \(2, 1152\)",
        ),
        (
            {"codes": torch.zeros(2, 1 << 17, dtype=torch.int8), "weight_bits": 8},
            "weight: expected few enough inputs for exact int32 sums, got 131072 at 8 x 8 bits",
        ),
        (
            {"codes": torch.zeros(2, 139904, dtype=torch.int8), "group_size": 128},
            "weight: expected few enough inputs for exact int32 sums, got 139904 at 4 x 8 bits",
        ),
    ],
)
def test_a_wrong_argument_is_named(change: dict[str, object], message: str) -> None:
    unit = torch.ones(37, 1)
    arguments: dict[str, object] = {
        "codes": torch.zeros(2, 64, dtype=torch.int8),
        "scale": torch.ones(2),
        "packed": ops.prepack_weight(torch.zeros(37, 32, dtype=torch.uint8), unit, None, 4),
        "weight_scale": unit,
        "bias": None,
        "out_dtype": torch.float32,
        "act_bits": 8,
        "weight_bits": 4,
        "group_size": -1,
    }
    with pytest.raises(ConfigError, match=message):
        ops.gemm(**(arguments | change))  # type: ignore[arg-type]


WEIGHT = torch.zeros(4, 32, dtype=torch.uint8)
EIGHT = torch.zeros(4, 8, dtype=torch.int8)
SCALE = torch.ones(4, 1)


def groups_of(*shape: int) -> torch.Tensor:
    return torch.ones(shape, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("weight", "scale", "group_scale", "bits", "message"),
    [
        (EIGHT, SCALE, None, 4, r"weight: expected contiguous uint8 .* got int8 \(4, 8\)"),
        (EIGHT[:, :7].clone(), SCALE, None, 8, "weight: expected an even number of inputs"),
        (EIGHT, SCALE[:3], None, 8, "weight_scale: expected a row for each of the 4 outputs"),
        (EIGHT, SCALE[:, 0], None, 8, r"weight_scale: expected contiguous float32 \(any, 1\)"),
        (EIGHT, SCALE.half(), None, 8, r"weight_scale: expected .* got float16 \(4, 1\)"),
        # What format 1 stored.
        (WEIGHT, torch.ones(4, 2), None, 4, r"weight_scale: expected .*\(any, 1\), got .*\(4, 2\)"),
        (EIGHT.T.contiguous().T, SCALE, None, 8, "weight: .*not contiguous"),
        (
            torch.zeros(1, 1 << 24, dtype=torch.int8),
            torch.ones(1, 1),
            None,
            8,
            "weight: expected few enough inputs for exact int32 sums",
        ),
        (
            WEIGHT,
            SCALE,
            torch.ones(4, 2),
            4,
            r"group_scale: expected contiguous uint8 \(4, any\), got float32 \(4, 2\)",
        ),
        (WEIGHT, SCALE, groups_of(3, 2), 4, r"group_scale: expected .*\(4, any\), got .*\(3, 2\)"),
        (WEIGHT, SCALE, groups_of(4), 4, r"group_scale: expected .*\(4, any\), got .*\(4\)"),
        (WEIGHT, SCALE, groups_of(2, 4).T, 4, "group_scale: expected .*not contiguous"),
        (WEIGHT, SCALE, groups_of(4, 3), 4, "group_scale: .*groups dividing the 64 inputs"),
        (WEIGHT, SCALE, groups_of(4, 0), 4, "group_scale: .*groups dividing the 64 inputs"),
        (WEIGHT, SCALE, groups_of(4, 4), 4, "group_size: .*, got 16 of 4-bit weights"),
        (
            torch.zeros(4, 64, dtype=torch.int8),
            SCALE,
            groups_of(4, 2),
            8,
            "group_size: expected -1 or, of 4-bit weights, .* got 32 of 8-bit weights",
        ),
    ],
)
def test_prepack_weight_names_a_wrong_argument(
    weight: torch.Tensor,
    scale: torch.Tensor,
    group_scale: torch.Tensor | None,
    bits: int,
    message: str,
) -> None:
    with pytest.raises(ConfigError, match=message):
        ops.prepack_weight(weight, scale, group_scale, bits)
