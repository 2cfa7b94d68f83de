# SPDX-License-Identifier: Apache-2.0
from typing import Literal

import pytest
import torch

from smoothrot_offline.rounding.rtn import ERROR_NORM, SHRINKS, clip_search_scale, quantize_rtn
from smoothrot_vllm.errors import CheckpointError, ConfigError
from smoothrot_vllm.format import WeightScheme


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
    searched = loss(rows, clip_search_scale(rows, 4))
    # The histogram may take a neighbour of the best shrink when both are equally good to within its
    # bins.
    assert (searched <= exhaustive * 1.05 + 1e-12).all()
    assert searched.sum() <= exhaustive.sum() * 1.005


def test_clip_search_of_many_rows_equals_that_of_each() -> None:
    rows = heavy_tailed(3000, 700)
    alone = torch.cat([clip_search_scale(row[None], 4) for row in rows[::100]])
    torch.testing.assert_close(clip_search_scale(rows, 4)[::100], alone, rtol=0, atol=0)


@pytest.mark.parametrize("group_size", [-1, 32, 64, 128])
def test_four_bit_error_is_at_most_half_a_step_inside_the_range(
    group_size: Literal[-1, 32, 64, 128],
) -> None:
    weight = heavy_tailed(48, 256)
    quantized = quantize_rtn(weight, WeightScheme(bits=4, group_size=group_size))
    assert quantized.codes.dtype == torch.int8
    assert quantized.scale.shape == (48, 1 if group_size == -1 else 256 // group_size)
    assert quantized.codes.amin() == -8
    assert quantized.codes.amax() == 7
    steps = quantized.scale.repeat_interleave(256 // quantized.scale.shape[1], 1)
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


@pytest.mark.parametrize("bits", [4, 8])
def test_zero_and_vanishing_rows_get_scale_one_and_zero_codes(bits: int) -> None:
    weight = heavy_tailed(4, 64)
    weight[1] = 0
    weight[2] = 1e-36
    quantized = quantize_rtn(weight, WeightScheme.model_validate({"bits": bits, "group_size": 32}))
    assert (quantized.scale[1:3] == 1).all()
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


def test_float64_and_float32_weights_give_the_same_codes() -> None:
    weight = heavy_tailed(32, 192)
    single = quantize_rtn(weight, WeightScheme(group_size=64))
    double = quantize_rtn(weight.double(), WeightScheme(group_size=64))
    assert torch.equal(single.codes, double.codes)
    assert torch.equal(single.scale, double.scale)
