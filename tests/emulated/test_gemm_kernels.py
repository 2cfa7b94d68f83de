# SPDX-License-Identifier: Apache-2.0
"""The hand-written CUDA GEMMs equal the reference: exact int32 sums and its float epilogue, on
ragged shapes."""

from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
from emulator import Emulator

from smoothrot_vllm import reference
from smoothrot_vllm.format import GROUP_SCALE_MAX

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


@dataclass(frozen=True)
class Product:
    """Codes over their whole range, the extremes included, and scales of mixed size."""

    codes: torch.Tensor
    scale: torch.Tensor
    weight: torch.Tensor
    weight_scale: torch.Tensor
    group_scale: torch.Tensor | None
    act_bits: int
    weight_bits: int

    @classmethod
    def of(
        cls,
        tokens: int,
        outputs: int,
        inputs: int,
        act_bits: int,
        weight_bits: int = 4,
        group: int | None = None,
    ) -> "Product":
        top, weight_top = reference.quant_max(act_bits), reference.quant_max(weight_bits)
        codes = torch.randint(-top - 1, top + 1, (tokens, inputs), dtype=torch.int8)
        weight = torch.randint(-weight_top - 1, weight_top + 1, (outputs, inputs), dtype=torch.int8)
        codes[0], weight[0] = -top - 1, -weight_top - 1
        weight[-1], codes[-1, ::2] = weight_top, top
        group_scale = None
        if group is not None:
            shape = (outputs, inputs // group)
            group_scale = torch.randint(1, GROUP_SCALE_MAX + 1, shape, dtype=torch.uint8)
            group_scale[0] = group_scale[-1] = GROUP_SCALE_MAX
        return cls(
            codes,
            torch.rand(tokens) * 0.1,
            reference.encode(weight, weight_bits),
            torch.rand(outputs, 1) * torch.logspace(-3, 0, outputs)[:, None],
            group_scale,
            act_bits,
            weight_bits,
        )

    def forms(self) -> list[torch.Tensor]:
        """Codes as bytes, and packed if they can be."""
        return [self.codes] if self.act_bits == 8 else [self.codes, reference.pack_int4(self.codes)]

    def expected(self, bias: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
        return reference.gemm(
            self.codes,
            self.scale,
            self.weight,
            self.weight_scale,
            self.group_scale,
            bias,
            dtype,
            8,
            self.weight_bits,
        )

    def run(
        self,
        emulator: Emulator,
        kernel: str,
        stored: torch.Tensor,
        dtype: torch.dtype,
        bias: torch.Tensor | None = None,
    ) -> torch.Tensor:
        return emulator.gemm(
            kernel,
            stored,
            self.scale,
            self.weight,
            self.weight_scale,
            dtype,
            bias,
            group_scale=self.group_scale,
        )


def check(emulator: Emulator, kernel: str, product: Product) -> None:
    """Every dtype of bias and output, every form of the codes."""
    for bias_dtype, dtype in zip([None, *DTYPES], [*DTYPES, torch.float32], strict=True):
        bias = None if bias_dtype is None else torch.randn(len(product.weight)).to(bias_dtype)
        expected = product.expected(bias, dtype)
        for stored in product.forms():
            got = product.run(emulator, kernel, stored, dtype, bias)
            torch.testing.assert_close(got, expected, rtol=0, atol=0)


@pytest.mark.parametrize("weight_bits", [4, 8])
@pytest.mark.parametrize("act_bits", [4, 8])
@pytest.mark.parametrize(
    ("tokens", "outputs", "inputs"),
    [(1, 16, 32), (1, 100, 1056), (3, 33, 160), (8, 64, 2048), (9, 40, 96), (16, 130, 416)],
)
def test_gemm_small_equals_the_reference(
    emulator: Emulator, tokens: int, outputs: int, inputs: int, act_bits: int, weight_bits: int
) -> None:
    check(emulator, "small", Product.of(tokens, outputs, inputs, act_bits, weight_bits))


@pytest.mark.parametrize("act_bits", [4, 8])
@pytest.mark.parametrize(
    ("tokens", "outputs", "inputs", "group"),
    [
        (1, 16, 32, 32),
        (1, 100, 1056, 32),
        (9, 33, 288, 32),
        (3, 33, 192, 64),
        (16, 70, 1088, 64),
        (8, 64, 2048, 128),
        (9, 130, 1152, 128),
    ],
)
def test_gemm_small_with_groups_equals_the_reference(
    emulator: Emulator, tokens: int, outputs: int, inputs: int, group: int, act_bits: int
) -> None:
    """Numbers of groups that eight does not divide, inputs that 128 does not."""
    check(emulator, "small", Product.of(tokens, outputs, inputs, act_bits, group=group))


@pytest.mark.parametrize("group", [None, 64])
@pytest.mark.parametrize("multiprocessors", [1, 2, 4])
def test_gemm_small_does_not_depend_on_how_wide_its_blocks_are(
    emulator_int4: Emulator, multiprocessors: int, group: int | None
) -> None:
    for tokens in (5, 12):
        product = Product.of(tokens, 144, 192, 4, group=group)
        with emulator_int4.options(multiprocessors=multiprocessors):
            got = product.run(emulator_int4, "small", product.forms()[1], torch.float32)
        torch.testing.assert_close(got, product.expected(None, torch.float32), rtol=0, atol=0)


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
    with emulator.options(multiprocessors=multiprocessors):
        check(emulator, "s8", Product.of(tokens, outputs, inputs, act_bits, weight_bits))


@pytest.mark.parametrize("act_bits", [4, 8])
@pytest.mark.parametrize("multiprocessors", [1, 100], ids=["wide", "narrow"])
@pytest.mark.parametrize(
    ("tokens", "outputs", "inputs", "group"),
    [
        (1, 1, 32, 32),
        (17, 65, 160, 32),
        (70, 130, 608, 32),
        (19, 70, 192, 64),
        (66, 130, 1088, 64),
        (17, 65, 128, 128),
        (70, 130, 1152, 128),
    ],
)
def test_gemm_s8_with_groups_equals_the_reference(
    emulator: Emulator,
    tokens: int,
    outputs: int,
    inputs: int,
    group: int,
    multiprocessors: int,
    act_bits: int,
) -> None:
    """Numbers of groups that eight does not divide, inputs that 128 does not."""
    with emulator.options(multiprocessors=multiprocessors):
        check(emulator, "s8", Product.of(tokens, outputs, inputs, act_bits, group=group))


@pytest.mark.parametrize("kernel", ["small", "s8"])
@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize("act_bits", [4, 8])
def test_each_code_and_group_scale_is_multiplied_exactly(
    emulator: Emulator, kernel: str, group: int, act_bits: int
) -> None:
    """A token for every single input: what comes out is code times group scale times its code."""
    inputs, outputs = 256, 16 * 15
    code = torch.arange(16, dtype=torch.int8).repeat(15) - 8
    scales = torch.arange(1, 16, dtype=torch.uint8).repeat_interleave(16)
    weight = reference.pack_int4(code[:, None].expand(outputs, inputs).contiguous())
    group_scale = scales[:, None].expand(outputs, inputs // group).contiguous()
    least = -reference.quant_max(act_bits) - 1
    for first in (0, group - 7, inputs - 16):
        codes = torch.zeros(16, inputs, dtype=torch.int8)
        codes[range(16), range(first, first + 16)] = least
        product = Product(
            codes, torch.ones(16), weight, torch.ones(outputs, 1), group_scale, act_bits, 4
        )
        exact = (code.int() * scales.int() * least).float().expand(16, outputs)
        for stored in product.forms():
            assert torch.equal(product.run(emulator, kernel, stored, torch.float32), exact)


@pytest.mark.parametrize("kernel", ["small", "s8"])
def test_the_largest_sums_do_not_overflow(emulator: Emulator, kernel: str) -> None:
    inputs = 131072 - 32
    codes, scale = torch.full((1, inputs), -128, dtype=torch.int8), torch.ones(1)
    packed = torch.full((1, inputs // 2), 0x88, dtype=torch.uint8)
    groups = torch.full((1, inputs // 32), GROUP_SCALE_MAX, dtype=torch.uint8)
    cases = ((packed, None, 1024.0), (codes, None, 16384.0), (packed, groups, 15360.0))
    for weight, group_scale, product in cases:
        got = emulator.gemm(
            kernel,
            *(codes, scale, weight, torch.ones(1, 1), torch.float32),
            group_scale=group_scale,
        )
        assert got.item() == product * inputs
    got = emulator.gemm(
        kernel,
        *(packed, scale, packed, torch.ones(1, 1), torch.float32),
        group_scale=groups,
    )
    assert got.item() == 64.0 * GROUP_SCALE_MAX * inputs


@pytest.mark.parametrize(
    ("kernel", "tokens", "inputs", "weight_bits", "group"),
    [
        ("small", 17, 64, 4, None),
        ("small", 1, 64, 8, 32),
        ("small", 1, 96, 4, 96),
        ("s8", 1, 48, 4, None),
        ("s8", 1, 192, 4, 16),
        ("s8", 1, 192, 8, 64),
    ],
)
def test_shapes_out_of_bounds_are_refused(
    emulator_int4: Emulator,
    kernel: str,
    tokens: int,
    inputs: int,
    weight_bits: int,
    group: int | None,
) -> None:
    product = Product.of(tokens, 8, inputs, 8, weight_bits, group)
    with pytest.raises(RuntimeError, match="cudaError 1"):
        product.run(emulator_int4, kernel, product.codes, torch.float32)
