# SPDX-License-Identifier: Apache-2.0
"""The CUDA quantize kernels give the reference's codes and scales bit for bit, in any order of
threads."""

from collections.abc import Iterator

import pytest
import torch
from awkward_rows import awkward_rows
from emulator import INT8, PACKED, Emulator

from smoothrot_vllm import reference
from smoothrot_vllm.hadamard import HadamardFactors, factorize

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
FORMS = [(4, PACKED), (4, INT8), (8, INT8)]
POWERS = [
    (32, 2),
    (64, 4),
    (96, 8),
    (96, 16),
    (96, 32),
    (192, 64),
    (256, 128),
    (1024, 512),
    (2048, 2048),
    (4096, 4096),
]
BASES = [
    (1376, 172),
    (160, 20),
    (96, 12),
    (288, 36),
    (160, 40),
    (672, 84),
    (4032, 252),
    (1184, 148),
    (576, 576),
    (1536, 768),
]
WIDE = [
    (8192, 8192),
    (14336, 14336),
    (18944, 18944),
    (11008, 11008),
    (32768, 32768),
    (28672, 28672),
    (24576, 12),
]

Result = tuple[torch.Tensor, torch.Tensor]


def assert_same(got: Result, expected: Result, bits: int, form: int) -> None:
    codes = reference.unpack_int4(expected[0]) if (bits, form) == (4, INT8) else expected[0]
    torch.testing.assert_close(got[0], codes, rtol=0, atol=0)
    torch.testing.assert_close(got[1], expected[1], rtol=0, atol=0, equal_nan=True)


@pytest.fixture(params=[0, 1], ids=["forward", "reverse"])
def emulator(request: pytest.FixtureRequest, emulator_int4: Emulator) -> Iterator[Emulator]:
    with emulator_int4.options(reverse_order=request.param):
        yield emulator_int4


@pytest.mark.parametrize("size", [32, 64, 288, 576, 4096, 4128, 8224, 16416])
@pytest.mark.parametrize(("bits", "form"), FORMS)
def test_quant_equals_the_reference(emulator: Emulator, size: int, bits: int, form: int) -> None:
    for dtype in DTYPES:
        x = torch.randn(2, size).to(dtype)
        assert_same(emulator.quant(x, 0.9, bits, form), reference.quant(x, 0.9, bits), bits, form)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("bits", "form"), FORMS)
def test_awkward_rows_are_treated_as_the_reference_does(
    emulator: Emulator, dtype: torch.dtype, bits: int, form: int
) -> None:
    x = awkward_rows(384, dtype)
    for clip in (1.0, 1e-9):
        assert_same(emulator.quant(x, clip, bits, form), reference.quant(x, clip, bits), bits, form)
    for block in (4, 64, 384):
        expected = reference.hadamard_quant(x, block, 1.0, bits)
        assert_same(emulator.quant(x, 1.0, bits, form, block=block), expected, bits, form)


@pytest.mark.parametrize(("size", "block"), [*POWERS, *BASES])
def test_hadamard_quant_equals_the_reference(emulator: Emulator, size: int, block: int) -> None:
    for dtype, (bits, form) in zip(DTYPES, FORMS, strict=True):
        x = torch.randn(3, size).to(dtype)
        expected = reference.hadamard_quant(x, block, 0.9, bits)
        assert_same(emulator.quant(x, 0.9, bits, form, block=block), expected, bits, form)


@pytest.mark.parametrize(
    "base", [b for b in range(12, 253, 4) if factorize(8 * b) == HadamardFactors(b, 8)]
)
def test_hadamard_quant_knows_every_base(emulator_int4: Emulator, base: int) -> None:
    x = torch.randn(1, 8 * base).half()
    expected = reference.hadamard_quant(x, 8 * base, 0.9, 4)
    assert_same(emulator_int4.quant(x, 0.9, 4, block=8 * base), expected, 4, PACKED)


@pytest.mark.parametrize(("size", "block"), WIDE)
def test_hadamard_quant_equals_the_reference_on_wide_rows(
    emulator: Emulator, size: int, block: int
) -> None:
    x = torch.randn(1, size).bfloat16()
    assert_same(
        emulator.quant(x, 0.9, 4, block=block),
        reference.hadamard_quant(x, block, 0.9, 4),
        4,
        PACKED,
    )


def test_blocks_that_take_several_rows_keep_them_apart(emulator: Emulator) -> None:
    x = torch.randn(11, 160)
    with_one = emulator.quant(x, 0.9, 4, block=20)
    assert emulator.counters().launches == 1
    assert_same(with_one, reference.hadamard_quant(x, 20, 0.9, 4), 4, PACKED)


@pytest.mark.parametrize(
    ("size", "block"),
    [(64, 0), (1056, 0), (64, 8), (256, 256), (144 * 2, 36), (1536, 1536), (8192, 8192)],
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_silu_mul_quant_equals_the_reference(
    emulator: Emulator, size: int, block: int, dtype: torch.dtype
) -> None:
    gate_up = (4 * torch.randn(2, 2 * size)).to(dtype)
    gate_up[0, 0], gate_up[0, 1] = -200.0, 200.0
    expected = reference.silu_mul_hadamard_quant(gate_up, block, 0.9, 4)
    assert_same(
        emulator.quant(gate_up, 0.9, 4, block=block, producer="silu_mul"), expected, 4, PACKED
    )


@pytest.mark.parametrize("size", [32, 576, 2080, 4096, 8192, 32768])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("with_residual", [False, True])
def test_rms_norm_quant_equals_the_reference(
    emulator: Emulator, size: int, dtype: torch.dtype, with_residual: bool
) -> None:
    x = (3 * torch.randn(2, size)).to(dtype)
    weight = torch.rand(size).to(dtype) if with_residual else None
    residual = torch.randn(2, size).to(dtype) if with_residual else None
    codes, scale, added = reference.rms_norm_quant(x, weight, 1e-6, 0.9, 4, residual)
    got = emulator.quant(
        x, 0.9, 4, producer="rms_norm", norm_weight=weight, residual=residual, epsilon=1e-6
    )
    assert_same(got, (codes, scale), 4, PACKED)
    if residual is not None:
        torch.testing.assert_close(residual, added, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("size", "block", "bits", "form"),
    [
        (48, 0, 4, PACKED),
        (32800, 0, 4, PACKED),
        (64, 0, 8, PACKED),
        (64, 0, 3, INT8),
        (96, 64, 4, PACKED),
        (24960, 12, 4, PACKED),
    ],
)
def test_arguments_out_of_bounds_are_refused(
    emulator: Emulator, size: int, block: int, bits: int, form: int
) -> None:
    with pytest.raises(RuntimeError, match="cudaError 1"):
        emulator.quant(torch.zeros(1, size), 1.0, bits, form, block=block)


def test_no_tokens_need_no_launch(emulator: Emulator) -> None:
    codes, scale = emulator.quant(torch.empty(0, 64), 1.0, 4)
    assert emulator.counters().launches == 0
    assert codes.shape == (0, 32)
    assert scale.shape == (0,)
