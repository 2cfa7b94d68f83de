# SPDX-License-Identifier: Apache-2.0
from typing import Literal

import pytest
import torch

from smoothrot_offline.rounding.rtn import (
    QuantizedWeight,
    fake_quantize_shrunk,
    quantize_rtn,
    searched_shrink,
    store,
)
from smoothrot_offline.rounding.scales import (
    CHANNEL_CANDIDATES,
    ERROR_NORM,
    SHRINKS,
    WeightScales,
    search_scales,
)
from smoothrot_vllm.errors import CheckpointError, ConfigError
from smoothrot_vllm.format import WeightScheme
from smoothrot_vllm.reference import dequantize_weight, unpack_group_scale

GROUPED = [32, 64, 128]


def heavy_tailed(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator) * torch.randn(*shape, generator=generator).abs()


def loss(rows: torch.Tensor, scale: torch.Tensor, top: int = 7) -> torch.Tensor:
    """L2.4 error of each row, in float64."""
    rows, scale = rows.double(), scale.double()[:, None]
    return ((rows / scale).round().clamp(-top - 1, top) * scale - rows).abs().pow(ERROR_NORM).sum(1)


@pytest.mark.parametrize("width", [32, 64, 128, 576, 1001])
def test_clip_search_matches_the_exhaustive_search(width: int) -> None:
    rows = heavy_tailed(64, width)
    largest = rows.abs().amax(1)
    exhaustive = torch.stack([loss(rows, largest * shrink / 7) for shrink in SHRINKS]).amin(0)
    searched = loss(rows, search_scales(rows, WeightScheme()).scale[:, 0])
    # The histogram may take a neighbour of the best shrink when both are equally good to within its
    # bins.
    assert (searched <= exhaustive * 1.05 + 1e-12).all()
    assert searched.sum() <= exhaustive.sum() * 1.005


@pytest.mark.parametrize("group_size", [-1, 32])
def test_search_of_many_rows_equals_that_of_each(group_size: Literal[-1, 32]) -> None:
    rows, scheme = heavy_tailed(3000, 704), WeightScheme(group_size=group_size)
    alone = torch.cat([search_scales(row[None], scheme).steps for row in rows[::100]])
    assert torch.equal(search_scales(rows, scheme).steps[::100], alone)


def group_losses(rows: torch.Tensor, step: torch.Tensor, group_size: int) -> torch.Tensor:
    """L2.4 error of each group of each row with a row's ``step (R,)``: float64 ``(R, G)``."""
    groups = rows.unflatten(1, (-1, group_size))
    steps = step[:, None].expand(groups.shape[:2]).flatten()
    return loss(groups.flatten(0, 1), steps).unflatten(0, groups.shape[:2])


def scaled_loss(rows: torch.Tensor, scales: WeightScales) -> torch.Tensor:
    groups = rows.unflatten(1, (scales.steps.shape[1], -1)).flatten(0, 1)
    return loss(groups, scales.steps.flatten()).unflatten(0, scales.steps.shape).sum(1)


@pytest.mark.parametrize("spread", [0.0, 1.0])
@pytest.mark.parametrize(("width", "group_size"), [(64, 32), (576, 64), (384, 128)])
def test_joint_search_matches_brute_force(
    width: int, group_size: Literal[32, 64, 128], spread: float
) -> None:
    """Every group scale from 1 to 15 beside 96 row scales, of groups alike and of groups that
    differ."""
    generator = torch.Generator().manual_seed(1)
    size = torch.randn(24, width // group_size, generator=generator).mul(spread).exp()
    rows = heavy_tailed(24, width) * size.repeat_interleave(group_size, 1)
    finest = rows.abs().amax(1) / (7 * 15)
    best = torch.full((len(rows),), torch.inf, dtype=torch.float64)
    for channel in torch.logspace(-1.5, 1, 96, base=2):
        tried = [group_losses(rows, finest * channel * g, group_size) for g in range(1, 16)]
        best = torch.minimum(best, torch.stack(tried).amin(0).sum(1))
    searched = scaled_loss(rows, search_scales(rows, WeightScheme(group_size=group_size)))
    assert (searched <= best * 1.06).all()
    assert searched.sum() <= best.sum() * 1.02


def test_several_row_scales_are_better_than_the_first() -> None:
    rows, scheme = heavy_tailed(256, 256), WeightScheme(group_size=32)
    searched = search_scales(rows, scheme)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("smoothrot_offline.rounding.scales.CHANNEL_CANDIDATES", (1.0,))
        single = search_scales(rows, scheme)
    assert len(CHANNEL_CANDIDATES) > 1
    assert scaled_loss(rows, searched).sum() < 0.99 * scaled_loss(rows, single).sum()


@pytest.mark.parametrize("group_size", GROUPED)
def test_integer_group_scales_lose_little_over_those_of_groups_alone(
    group_size: Literal[32, 64, 128],
) -> None:
    weight = torch.randn(96, 1024, generator=torch.Generator().manual_seed(2))
    groups = weight.reshape(-1, group_size)
    alone = quantize_rtn(groups, WeightScheme()).dequantize().reshape(weight.shape)
    joint = quantize_rtn(weight, WeightScheme(group_size=group_size)).dequantize()
    per_channel = quantize_rtn(weight, WeightScheme()).dequantize()
    errors = [(found - weight).norm() for found in (alone, joint, per_channel)]
    assert errors[1] < 1.03 * errors[0]
    assert errors[1] < 0.96 * errors[2]


def test_group_scales_use_their_range_and_are_one_where_all_is_zero() -> None:
    weight = heavy_tailed(64, 256)
    weight[:, 32:64] = 0
    weight[:, 64:96] *= 1e-3
    found = search_scales(weight, WeightScheme(group_size=32))
    assert found.group_scale is not None
    assert found.group_scale.dtype == torch.uint8
    assert (found.group_scale[:, 1:3] == 1).all()
    assert found.group_scale.amin() == 1
    assert found.group_scale.amax() == 15


@pytest.mark.parametrize(("width", "group_size"), [(576, 64), (128, 32), (96, 32)])
def test_what_is_stored_is_what_dequantize_gives(width: int, group_size: Literal[32, 64]) -> None:
    """576 / 64 and 96 / 32 are odd numbers of groups: the last high nibble is padding."""
    weight, scheme = heavy_tailed(24, width), WeightScheme(group_size=group_size)
    quantized, groups = quantize_rtn(weight, scheme), width // group_size
    stored, error = store([(weight, quantized)], weight.shape, scheme, "q")
    assert list(stored) == ["q.weight_packed", "q.weight_scale", "q.weight_group_scale"]
    assert stored["q.weight_group_scale"].shape == (24, (groups + 1) // 2)
    if groups % 2:
        assert (stored["q.weight_group_scale"][:, -1] < 16).all()
    group_scale = unpack_group_scale(stored["q.weight_group_scale"], groups)
    read = dequantize_weight(stored["q.weight_packed"], stored["q.weight_scale"], group_scale, 4)
    assert torch.equal(read, quantized.dequantize())
    assert error == pytest.approx(float((weight - read).norm() / weight.norm()), rel=1e-5)
    # Codes times group scales are whole and fit int8.
    whole = read.double() / stored["q.weight_scale"].double()
    assert (whole - whole.round()).abs().max() < 1e-4
    assert whole.abs().round().max() <= 120


@pytest.mark.parametrize("group_size", [-1, 32, 64])
def test_the_quantizer_with_a_gradient_starts_from_what_is_stored(
    group_size: Literal[-1, 32, 64],
) -> None:
    weight, scheme = heavy_tailed(32, 192), WeightScheme(group_size=group_size)
    weight[3] = 0
    weight[4, 64:128] = 0
    shrink = searched_shrink(weight, scheme)
    exact = quantize_rtn(weight, scheme).dequantize()
    torch.testing.assert_close(fake_quantize_shrunk(weight, shrink, 4), exact, rtol=1e-5, atol=1e-7)
    moved = (weight * torch.linspace(0.7, 1.4, 192)).requires_grad_()
    found = fake_quantize_shrunk(moved, shrink, 4)
    found.sum().backward()
    assert moved.grad is not None
    assert moved.grad.isfinite().all()
    assert moved.grad[0].count_nonzero() > 150
    if shrink.group is not None:
        # Steps stay whole multiples of the row's as the weight moves: few int8 values a row.
        scale = shrink.channel[0] * moved[0].abs().max()
        whole = (found[0] / scale).detach()
        torch.testing.assert_close(whole, whole.round(), rtol=0, atol=1e-3)


@pytest.mark.parametrize("group_size", [-1, 32, 64, 128])
def test_four_bit_error_is_at_most_half_a_step_inside_the_range(
    group_size: Literal[-1, 32, 64, 128],
) -> None:
    weight = heavy_tailed(48, 256)
    quantized = quantize_rtn(weight, WeightScheme(bits=4, group_size=group_size))
    assert quantized.codes.dtype == torch.int8
    assert quantized.scale.shape == (48, 1)
    assert quantized.codes.amin() == -8
    assert quantized.codes.amax() == 7
    steps = WeightScales(quantized.scale, quantized.group_scale).steps
    steps = steps.repeat_interleave(256 // steps.shape[1], 1)
    inside = (weight < 7 * steps) & (weight > -8 * steps)
    error = (quantized.dequantize() - weight).abs()
    assert inside.float().mean() > 0.9
    assert (error[inside] <= steps[inside] * (0.5 + 1e-6)).all()


def test_smaller_groups_lose_less() -> None:
    weight = heavy_tailed(64, 512)
    errors = [
        (quantize_rtn(weight, WeightScheme(bits=4, group_size=g)).dequantize() - weight)
        .square()
        .sum()
        for g in (-1, 128, 64, 32)
    ]
    assert errors == sorted(errors, reverse=True)


def test_eight_bits_represent_the_largest_weight() -> None:
    weight = heavy_tailed(16, 300)
    quantized = quantize_rtn(weight, WeightScheme(bits=8))
    torch.testing.assert_close(quantized.scale[:, 0], weight.abs().amax(1) / 127)
    assert (quantized.dequantize() - weight).abs().le(quantized.scale * 0.5001).all()


@pytest.mark.parametrize(("bits", "group_size"), [(4, -1), (4, 32), (8, -1)])
def test_zero_and_vanishing_rows_get_scale_one_and_zero_codes(bits: int, group_size: int) -> None:
    weight = heavy_tailed(4, 64)
    weight[1] = 0
    weight[2] = 1e-36
    quantized = quantize_rtn(
        weight, WeightScheme.model_validate({"bits": bits, "group_size": group_size})
    )
    assert (quantized.scale[1:3] == 1).all()
    if quantized.group_scale is not None:
        assert (quantized.group_scale[1:3] == 1).all()
    assert (quantized.codes[1:3] == 0).all()
    assert (quantized.codes[0] != 0).any()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_non_finite_weights_are_refused_with_their_place(value: float) -> None:
    weight = heavy_tailed(8, 64)
    weight[5, 7] = value
    with pytest.raises(CheckpointError, match=r"layers\.3\.q: .*row 5, column 7"):
        quantize_rtn(weight, WeightScheme(), name="layers.3.q")


def test_group_size_that_does_not_divide_the_input_is_refused() -> None:
    with pytest.raises(ConfigError, match="group size 128"):
        quantize_rtn(heavy_tailed(4, 192), WeightScheme(group_size=128))


def same_scales(first: QuantizedWeight, second: QuantizedWeight) -> bool:
    assert first.group_scale is not None
    assert second.group_scale is not None
    return torch.equal(first.scale, second.scale) and torch.equal(
        first.group_scale, second.group_scale
    )


def test_float64_and_float32_weights_give_the_same_codes() -> None:
    weight = heavy_tailed(32, 192)
    single = quantize_rtn(weight, WeightScheme(group_size=64))
    double = quantize_rtn(weight.double(), WeightScheme(group_size=64))
    assert torch.equal(single.codes, double.codes)
    assert same_scales(single, double)
