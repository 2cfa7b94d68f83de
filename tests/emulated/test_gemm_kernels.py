# SPDX-License-Identifier: Apache-2.0
"""The hand-written CUDA GEMMs equal the reference: exact int32 sums and its float epilogue, on
ragged shapes."""

from collections.abc import Iterator

import pytest
import torch
from emulator import Emulator

from smoothrot_vllm import reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


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


Operands = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def operands(
    tokens: int, outputs: int, inputs: int, act_bits: int, groups: int = 1, weight_bits: int = 4
) -> Operands:
    """Codes over their whole range, the extremes included, and scales of mixed size."""
    top, weight_top = reference.quant_max(act_bits), reference.quant_max(weight_bits)
    codes = torch.randint(-top - 1, top + 1, (tokens, inputs), dtype=torch.int8)
    weight = torch.randint(-weight_top - 1, weight_top + 1, (outputs, inputs), dtype=torch.int8)
    codes[0], weight[0] = -top - 1, -weight_top - 1
    scale = torch.rand(tokens) * 0.1
    weight_scale = torch.rand(outputs, groups) * torch.logspace(-3, 0, outputs)[:, None]
    return codes, scale, reference.encode(weight, weight_bits), weight_scale


def stored_forms(codes: torch.Tensor, act_bits: int) -> list[torch.Tensor]:
    return [codes] if act_bits == 8 else [codes, reference.pack_int4(codes)]


@pytest.mark.parametrize("weight_bits", [4, 8])
@pytest.mark.parametrize("act_bits", [4, 8])
@pytest.mark.parametrize(
    ("tokens", "outputs", "inputs"),
    [(1, 16, 32), (1, 100, 1056), (3, 33, 160), (8, 64, 2048), (9, 40, 96), (16, 130, 416)],
)
def test_gemm_small_equals_the_reference(
    emulator: Emulator, tokens: int, outputs: int, inputs: int, act_bits: int, weight_bits: int
) -> None:
    codes, scale, weight, weight_scale = operands(tokens, outputs, inputs, act_bits, 1, weight_bits)
    for bias_dtype, out_dtype in zip([None, *DTYPES], [*DTYPES, torch.float32], strict=True):
        bias = None if bias_dtype is None else torch.randn(outputs).to(bias_dtype)
        expected = reference.gemm(
            codes, scale, weight, weight_scale, bias, out_dtype, 8, weight_bits
        )
        for stored in stored_forms(codes, act_bits):
            got = emulator.gemm("small", stored, scale, weight, weight_scale, out_dtype, bias)
            torch.testing.assert_close(got, expected, rtol=0, atol=0)


@pytest.mark.parametrize("multiprocessors", [1, 2, 4])
def test_gemm_small_does_not_depend_on_how_wide_its_blocks_are(
    emulator_int4: Emulator, multiprocessors: int
) -> None:
    codes, scale, weight, weight_scale = operands(5, 144, 192, 4)
    expected = reference.gemm(codes, scale, weight, weight_scale, None, torch.float32, 8, 4)
    with emulator_int4.options(multiprocessors=multiprocessors):
        got = emulator_int4.gemm(
            "small", reference.pack_int4(codes), scale, weight, weight_scale, torch.float32
        )
    torch.testing.assert_close(got, expected, rtol=0, atol=0)


@pytest.mark.parametrize("weight_bits", [4, 8])
@pytest.mark.parametrize("act_bits", [4, 8])
@pytest.mark.parametrize(
    ("tokens", "outputs", "inputs", "multiprocessors"),
    [(1, 1, 32, 2), (17, 65, 160, 2), (70, 130, 576, 1), (130, 72, 288, 1)],
)
def test_gemm_s8_equals_the_reference(
    emulator: Emulator,
    tokens: int,
    outputs: int,
    inputs: int,
    multiprocessors: int,
    act_bits: int,
    weight_bits: int,
) -> None:
    codes, scale, weight, weight_scale = operands(tokens, outputs, inputs, act_bits, 1, weight_bits)
    for bias_dtype, out_dtype in zip([None, *DTYPES], [*DTYPES, torch.float32], strict=True):
        bias = None if bias_dtype is None else torch.randn(outputs).to(bias_dtype)
        expected = reference.gemm(
            codes, scale, weight, weight_scale, bias, out_dtype, 8, weight_bits
        )
        for stored in stored_forms(codes, act_bits):
            with emulator.options(multiprocessors=multiprocessors):
                got = emulator.gemm("s8", stored, scale, weight, weight_scale, out_dtype, bias)
            torch.testing.assert_close(got, expected, rtol=0, atol=0)


@pytest.mark.parametrize("weight_bits", [4, 8])
@pytest.mark.parametrize("act_bits", [4, 8])
@pytest.mark.parametrize(
    ("inputs", "group"), [(96, 32), (384, 64), (640, 128), (576, 192), (1024, 512)]
)
def test_gemm_s8_with_groups_errs_at_most_twice_as_much_as_torch(
    emulator: Emulator, inputs: int, group: int, act_bits: int, weight_bits: int
) -> None:
    codes, scale, weight, weight_scale = operands(
        19, 70, inputs, act_bits, inputs // group, weight_bits
    )
    bias = torch.randn(70)
    sums = reference.accumulate(codes, weight, 8, weight_bits, group).double()
    exact = (
        torch.einsum("gtn,ng->tn", sums, weight_scale.double()) * scale.double()[:, None]
        + bias.double()
    )
    expected = reference.gemm(
        codes, scale, weight, weight_scale, bias, torch.float32, 8, weight_bits
    )
    allowed = 2 * (expected.double() - exact).abs().max()
    for stored in stored_forms(codes, act_bits):
        got = emulator.gemm("s8", stored, scale, weight, weight_scale, torch.float32, bias)
        assert (got.double() - exact).abs().max() <= allowed


def test_gemm_s8_with_groups_has_exact_sums(emulator: Emulator) -> None:
    """With scales that are powers of two every float step is exact, so the sums show through."""
    codes, _, weight, _ = operands(19, 70, 384, 4)
    weight_scale = 2.0 ** torch.randint(-3, 3, (70, 12))
    scale = 2.0 ** torch.randint(-3, 3, (19,))
    expected = reference.gemm(codes, scale, weight, weight_scale, None, torch.float32, 8, 4)
    got = emulator.gemm("s8", codes, scale, weight, weight_scale, torch.float32)
    torch.testing.assert_close(got, expected, rtol=0, atol=0)


def test_the_largest_sums_do_not_overflow(emulator: Emulator) -> None:
    inputs = 131072 - 32
    codes, scale = torch.full((1, inputs), -128, dtype=torch.int8), torch.ones(1)
    for weight, product in (
        (torch.full((1, inputs // 2), 0x88, dtype=torch.uint8), 1024.0),
        (codes, 16384.0),
    ):
        for kernel in ("small", "s8"):
            got = emulator.gemm(kernel, codes, scale, weight, torch.ones(1, 1), torch.float32)
            assert got.item() == product * inputs


@pytest.mark.parametrize(
    ("kernel", "tokens", "inputs", "groups"),
    [("small", 17, 64, 1), ("small", 1, 64, 2), ("s8", 1, 48, 1), ("s8", 1, 192, 12)],
)
def test_shapes_out_of_bounds_are_refused(
    emulator_int4: Emulator, kernel: str, tokens: int, inputs: int, groups: int
) -> None:
    codes, scale, weight, weight_scale = operands(tokens, 8, inputs, 8, groups)
    with pytest.raises(RuntimeError, match="cudaError 1"):
        emulator_int4.gemm(kernel, codes, scale, weight, weight_scale, torch.float32)
