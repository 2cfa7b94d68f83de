# SPDX-License-Identifier: Apache-2.0
"""The reference ops against independent, float64 or integer, statements of what they mean."""

import math

import pytest
import torch

from smoothrot_vllm import reference
from smoothrot_vllm.hadamard import hadamard_matrix

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def test_pack_int4_puts_the_even_index_in_the_low_nibble() -> None:
    packed = reference.pack_int4(torch.tensor([[1, -8, 7, -1]], dtype=torch.int8))
    assert packed.tolist() == [[0x81, 0xF7]]


def test_unpack_int4_inverts_pack_int4_for_every_pair() -> None:
    values = torch.arange(-8, 8, dtype=torch.int8)
    pairs = torch.cartesian_prod(values, values)
    assert torch.equal(reference.unpack_int4(reference.pack_int4(pairs)), pairs)


@pytest.mark.parametrize(
    ("size", "block"),
    [(8, 1), (8, 8), (64, 16), (24, 12), (72, 36), (112, 28), (576, 576), (1536, 768)],
)
def test_hadamard_transform_equals_the_dense_matrix(size: int, block: int) -> None:
    x = torch.randn(3, size, dtype=torch.float64)
    dense = (x.reshape(-1, block) @ hadamard_matrix(block)).reshape(3, size)
    torch.testing.assert_close(
        reference.hadamard_transform(x, block) / math.sqrt(block), dense, rtol=0, atol=1e-12
    )


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("dtype", DTYPES)
def test_quant_error_is_at_most_half_a_step_without_clipping(dtype: torch.dtype, bits: int) -> None:
    x = (torch.randn(16, 64) * torch.logspace(-6, 3, 16)[:, None]).to(dtype)
    codes, scale = reference.quant(x, 1.0, bits)
    error = reference.decode(codes, bits).double() * scale[:, None].double() - x.double()
    # Three float32 roundings (of the scale, its reciprocal and the product) may move a code of 127
    # across a tie.
    assert (error.abs() <= scale.double()[:, None] * (0.5 + 3 * 127 * 2.0**-24)).all()


def test_quant_rounds_ties_to_even_and_clips_to_the_asymmetric_range() -> None:
    x = torch.tensor([[7.0, 0.5, 1.5, 2.5, -0.5, -1.5, -6.5, -7.0]])
    assert reference.decode(reference.quant(x, 1.0, 4)[0], 4).tolist() == [
        [7, 0, 2, 2, 0, -2, -6, -7]
    ]
    assert reference.decode(reference.quant(x, 0.5, 4)[0], 4).tolist() == [
        [7, 1, 3, 5, -1, -3, -8, -8]
    ]


@pytest.mark.parametrize("bits", [4, 8])
def test_quant_of_a_zero_or_subnormal_row_is_zero_with_scale_one(bits: int) -> None:
    x = torch.zeros(2, 8)
    x[1, 3] = 1e-40
    codes, scale = reference.quant(x, 0.9, bits)
    assert not reference.decode(codes, bits).any()
    assert scale.tolist() == [1.0, 1.0]


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
def test_quant_of_a_row_that_is_not_finite_carries_nan_in_its_scale_alone(poison: float) -> None:
    x = torch.ones(2, 8)
    x[0, 5] = poison
    codes, scale = reference.quant(x, 1.0, 8)
    assert math.isnan(scale[0])
    assert not codes[0].any()
    assert codes[1].tolist() == [127] * 8


def test_hadamard_quant_is_quant_of_the_rotated_row() -> None:
    x = torch.randn(4, 1536)
    codes, scale = reference.hadamard_quant(x, 768, 0.9, 8)
    rotated = (x.double().reshape(-1, 768) @ hadamard_matrix(768)).reshape(4, 1536)
    error = codes.double() * scale[:, None].double() - rotated
    clipped = rotated.abs() > 127.5 * scale[:, None]
    assert (error.abs() <= scale.double()[:, None] * 0.501)[~clipped].all()


def test_the_even_group_is_in_the_low_nibble_and_zero_past_the_last() -> None:
    packed = reference.pack_group_scale(torch.tensor([[1, 15, 7]], dtype=torch.uint8))
    assert packed.tolist() == [[0xF1, 0x07]]


@pytest.mark.parametrize("groups", [1, 2, 9, 12])
def test_unpack_group_scale_inverts_pack_group_scale(groups: int) -> None:
    values = torch.randint(0, 16, (3, 5, groups), dtype=torch.uint8)
    packed = reference.pack_group_scale(values)
    assert packed.shape == (3, 5, (groups + 1) // 2)
    assert torch.equal(reference.unpack_group_scale(packed, groups), values)


def test_scaled_codes_are_codes_times_their_groups_integer_and_fit_int8() -> None:
    weight = reference.encode(torch.tensor([[-8, 7, -8, 3, 1, -1, 2, 0]], dtype=torch.int8), 4)
    group_scale = torch.tensor([[15, 1, 3, 9]], dtype=torch.uint8)
    scaled = reference.scaled_codes(weight, group_scale, 4)
    assert scaled.dtype == torch.int8
    assert scaled.tolist() == [[-120, 105, -8, 3, 3, -3, 18, 0]]
    assert reference.dequantize_weight(weight, torch.tensor([[0.5]]), group_scale, 4).tolist() == [
        [-60, 52.5, -4, 1.5, 1.5, -1.5, 9, 0]
    ]


@pytest.mark.parametrize("groups", [0, 1, 4])
def test_gemm_equals_the_dequantized_product_in_float64(groups: int) -> None:
    x, weight_scale, bias = torch.randn(5, 64), torch.rand(7, 1), torch.randn(7)
    codes, scale = reference.quant(x, 1.0, 8)
    weight = torch.randint(-8, 8, (7, 64), dtype=torch.int8)
    stored = reference.encode(weight, 4)
    group_scale = torch.randint(1, 16, (7, groups), dtype=torch.uint8) if groups else None
    y = reference.gemm(codes, scale, stored, weight_scale, group_scale, bias, torch.float32, 8, 4)
    exact = weight.double() * weight_scale
    if group_scale is not None:
        exact = exact * group_scale.repeat_interleave(64 // groups, 1)
    expected = (codes.double() * scale.double()[:, None]) @ exact.T + bias
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-5)


def test_accumulate_is_exact_where_float32_would_not_be() -> None:
    codes = torch.full((1, 4096), -128, dtype=torch.int8)
    codes[0, 0] = 1
    weight = torch.full((1, 4096), -128, dtype=torch.int8)
    assert reference.accumulate(codes, weight, None, 8, 8).item() == 4095 * 128 * 128 - 128


def dequantized(codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return codes.double() * scale.double()[:, None]


@pytest.mark.parametrize("dtype", DTYPES)
def test_silu_mul_hadamard_quant_is_hadamard_quant_of_silu_times_up(dtype: torch.dtype) -> None:
    gate_up = (5 * torch.randn(8, 2 * 64)).to(dtype)
    gate, up = gate_up.chunk(2, dim=-1)
    # In the dtype of the input, as vLLM's SiluAndMul computes it.
    rotated = (torch.nn.functional.silu(gate) * up).double() @ hadamard_matrix(64)
    codes, scale = reference.silu_mul_hadamard_quant(gate_up, 64, 1.0, 8)
    assert ((dequantized(codes, scale) - rotated).abs() <= scale.double()[:, None] * 0.501).all()


def test_silu_of_large_inputs_is_the_input_or_nothing() -> None:
    gate_up = torch.tensor([[-1e4, 1e4, -88.0, 88.0, 1.0, 1.0, 1.0, 1.0]])
    codes, scale = reference.silu_mul_hadamard_quant(gate_up, 0, 1.0, 8)
    torch.testing.assert_close(
        dequantized(codes, scale), torch.tensor([[0.0, 1e4, 0.0, 88.0]]).double(), rtol=0.11, atol=0
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_swigluoai_hadamard_quant_is_that_of_gpt_oss_activation(dtype: torch.dtype) -> None:
    gate_up = (6 * torch.randn(16, 2 * 64)).to(dtype)
    assert (gate_up.abs() > 7).any()
    gate, up = gate_up.double().chunk(2, dim=-1)
    glu = gate.clamp(max=7.0) * torch.sigmoid(1.702 * gate.clamp(max=7.0))
    product = ((up.clamp(-7.0, 7.0) + 1) * glu).to(dtype)
    for block, expected in ((64, product.double() @ hadamard_matrix(64)), (0, product.double())):
        codes, scale = reference.swigluoai_hadamard_quant(gate_up, block, 1.0, 8)
        error = (dequantized(codes, scale) - expected).abs()
        assert (error <= scale.double()[:, None] * 0.501).all()


def test_swigluoai_of_what_is_not_a_number_is_not_a_number() -> None:
    gate_up = torch.ones(3, 8)
    gate_up[0, 1], gate_up[1, 6] = torch.nan, torch.nan
    gate_up[2, 0], gate_up[2, 4] = torch.inf, -torch.inf
    _, scale = reference.swigluoai_hadamard_quant(gate_up, 0, 1.0, 8)
    assert scale.isnan().tolist() == [True, True, False]


def test_the_exponential_errs_by_less_than_two_units_in_the_last_place() -> None:
    x = torch.linspace(-87, 88, 200001)
    exact = x.double().exp()
    assert ((reference._exp(x).double() - exact).abs() / exact).max() < 2 * 2.0**-23


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [8, 576, 4096])
def test_rms_norm_quant_is_quant_of_the_normed_sum(dtype: torch.dtype, size: int) -> None:
    x, residual, weight = (
        torch.randn(4, size).to(dtype),
        torch.randn(4, size).to(dtype),
        torch.rand(size).to(dtype),
    )
    codes, scale, added = reference.rms_norm_quant(x, weight, 1e-6, 1.0, 8, residual)
    assert added is not None
    torch.testing.assert_close(added, x + residual, rtol=0, atol=0)
    exact = torch.nn.functional.rms_norm(added.double(), (size,), weight.double(), 1e-6)
    assert ((dequantized(codes, scale) - exact).abs() <= scale.double()[:, None] * 0.501).all()
