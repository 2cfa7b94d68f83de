# SPDX-License-Identifier: Apache-2.0
from dataclasses import replace
from typing import Literal

import pytest
import torch

from smoothrot_offline.rounding.gptq import HessianAccumulator, quantize_gptq
from smoothrot_offline.rounding.rtn import QuantizedWeight, quantize_rtn
from smoothrot_vllm.errors import CheckpointError, ConfigError
from smoothrot_vllm.format import WeightScheme

OUT, IN, TOKENS = 48, 192, 1024
PER_CHANNEL = WeightScheme()


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.fixture
def weight(generator: torch.Generator) -> torch.Tensor:
    return torch.randn(OUT, IN, generator=generator)


@pytest.fixture
def inputs(generator: torch.Generator) -> torch.Tensor:
    """Correlated tokens whose channels differ in size: a random mix of 32 factors, plus noise."""
    factors = torch.randn(TOKENS, 32, generator=generator) @ torch.randn(
        32, IN, generator=generator
    )
    noise = torch.randn(TOKENS, IN, generator=generator)
    return (factors + noise) * torch.rand(IN, generator=generator).mul(2).exp()


def hessian_of(x: torch.Tensor) -> torch.Tensor:
    accumulator = HessianAccumulator(x.shape[1])
    accumulator.add(x)
    return accumulator.hessian


def output_error(
    weight: torch.Tensor,
    quantized: QuantizedWeight,
    x: torch.Tensor,
    target: torch.Tensor | None = None,
) -> float:
    y = (x if target is None else target).double() @ weight.double().T
    return (y - x.double() @ quantized.dequantize(torch.float64).T).square().sum().item()


def assert_same_scales(first: QuantizedWeight, second: QuantizedWeight) -> None:
    assert torch.equal(first.scale, second.scale)
    if first.group_scale is None or second.group_scale is None:
        assert first.group_scale is second.group_scale
    else:
        assert torch.equal(first.group_scale, second.group_scale)


def test_accumulated_moments_are_those_of_all_batches_together(inputs: torch.Tensor) -> None:
    full = inputs + 0.1 * inputs.roll(1, 1)
    accumulator = HessianAccumulator(IN, asymmetric=True)
    for x, y in zip(inputs.reshape(8, -1, 16, IN), full.reshape(8, -1, 16, IN), strict=True):
        accumulator.add(x, y)
    x, y = inputs.double(), full.double()
    torch.testing.assert_close(accumulator.hessian, x.T @ x / TOKENS, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(accumulator.cross, (y - x).T @ x / TOKENS, rtol=1e-5, atol=1e-4)


def test_a_token_that_counts_three_times_is_as_three_tokens(inputs: torch.Tensor) -> None:
    weights = torch.arange(TOKENS) % 4
    weighed = HessianAccumulator(IN, asymmetric=True)
    repeated = HessianAccumulator(IN, asymmetric=True)
    full = inputs + 0.1 * inputs.roll(1, 1)
    batches = (16, -1, IN)
    weighed.add(inputs.view(batches), full.view(batches), weights=weights.view(16, -1).float())
    repeated.add(inputs.repeat_interleave(weights, 0), full.repeat_interleave(weights, 0))
    share = repeated.tokens / TOKENS
    torch.testing.assert_close(weighed.hessian, share * repeated.hessian, rtol=1e-5, atol=1e-4)
    assert repeated.cross is not None
    torch.testing.assert_close(weighed.cross, share * repeated.cross, rtol=1e-5, atol=1e-4)


def test_non_finite_activations_are_refused() -> None:
    with pytest.raises(CheckpointError, match="finite activations"):
        HessianAccumulator(4).add(torch.tensor([[1.0, torch.inf, 0.0, 0.0]]))


@pytest.mark.parametrize("group_size", [-1, 32])
@pytest.mark.parametrize("act_order", [False, True])
def test_white_inputs_leave_nothing_to_compensate(
    weight: torch.Tensor, group_size: Literal[-1, 32], act_order: bool
) -> None:
    scheme = WeightScheme(group_size=group_size)
    quantized, plain = (
        quantize_gptq(weight, torch.eye(IN).double(), scheme, act_order=act_order),
        quantize_rtn(weight, scheme),
    )
    assert torch.equal(quantized.codes, plain.codes)
    assert_same_scales(quantized, plain)


@pytest.mark.parametrize(("bits", "group_size"), [(4, -1), (4, 32), (4, 64), (8, -1)])
@pytest.mark.parametrize("act_order", [False, True])
def test_output_error_is_well_below_rtn_on_correlated_inputs(
    weight: torch.Tensor, inputs: torch.Tensor, bits: int, group_size: int, act_order: bool
) -> None:
    scheme = WeightScheme.model_validate({"bits": bits, "group_size": group_size})
    quantized = quantize_gptq(weight, hessian_of(inputs), scheme, act_order=act_order)
    assert output_error(weight, quantized, inputs) < 0.5 * output_error(
        weight, quantize_rtn(weight, scheme), inputs
    )


def test_groups_leave_less_error_than_a_scale_per_channel(
    weight: torch.Tensor, inputs: torch.Tensor
) -> None:
    weight, hessian = weight * torch.logspace(-0.5, 0.5, IN), hessian_of(inputs)
    errors = [
        output_error(weight, quantize_gptq(weight, hessian, WeightScheme(group_size=g)), inputs)
        for g in (-1, 64, 32)
    ]
    assert errors == sorted(errors, reverse=True)


@pytest.mark.parametrize("group_size", [-1, 64])
def test_rounding_is_that_of_the_plain_recursion(
    weight: torch.Tensor, inputs: torch.Tensor, group_size: Literal[-1, 64]
) -> None:
    """Optimal brain quantization in float64, one channel at a time, H re-inverted over what
    remains: no blocks, no Cholesky. The steps are those that the checkpoint will have."""
    hessian = hessian_of(inputs)
    damped = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(IN)
    scheme = WeightScheme(group_size=group_size)
    quantized = quantize_gptq(weight, hessian, scheme, act_order=False)
    ones = replace(quantized, codes=torch.ones(OUT, IN, dtype=torch.int8))
    steps = ones.dequantize(torch.float64)
    work, codes = weight.double().clone(), torch.empty(OUT, IN, dtype=torch.float64)
    for i in range(IN):
        inverse = torch.linalg.inv(damped[i:, i:])
        codes[:, i] = (work[:, i] / steps[:, i]).round().clamp(-8, 7)
        error = (work[:, i] - codes[:, i] * steps[:, i]) / inverse[0, 0]
        work[:, i:] -= error[:, None] * inverse[0]
    # A value within float32 noise of a rounding tie may go the other way; its row then differs from
    # there on.
    same_rows = (quantized.codes == codes).all(dim=1).float().mean()
    assert same_rows > 0.8
    assert output_error(weight, quantized, inputs) < 1.02 * output_error(
        weight, replace(quantized, codes=codes.to(torch.int8)), inputs
    )


def test_act_order_and_damping_act(weight: torch.Tensor, inputs: torch.Tensor) -> None:
    hessian = hessian_of(inputs)
    base = quantize_gptq(weight, hessian, PER_CHANNEL, act_order=False)
    ordered = quantize_gptq(weight, hessian, PER_CHANNEL, act_order=True)
    assert output_error(weight, ordered, inputs) < output_error(weight, base, inputs)
    assert not torch.equal(
        base.codes, quantize_gptq(weight, hessian, PER_CHANNEL, act_order=False, damping=0.3).codes
    )
    overdamped = quantize_gptq(weight, hessian, PER_CHANNEL, act_order=False, damping=1e9)
    assert torch.equal(overdamped.codes, quantize_rtn(weight, PER_CHANNEL).codes)


def test_act_order_keeps_groups_in_their_place(weight: torch.Tensor, inputs: torch.Tensor) -> None:
    scheme = WeightScheme(group_size=32)
    weight = weight * torch.logspace(-2, 2, IN)
    quantized = quantize_gptq(weight, hessian_of(inputs), scheme, act_order=True)
    assert_same_scales(quantized, quantize_rtn(weight, scheme))
    assert output_error(weight, quantized, inputs) < output_error(
        weight, quantize_rtn(weight, scheme), inputs
    )


@pytest.mark.parametrize("damping", [0.0, 0.01])
@pytest.mark.parametrize("tokens", [0, 1, 20])
def test_singular_hessians_are_damped_until_they_factorize(
    weight: torch.Tensor, inputs: torch.Tensor, damping: float, tokens: int
) -> None:
    x = inputs[:tokens]
    quantized = quantize_gptq(weight, hessian_of(x), PER_CHANNEL, damping=damping)
    plain = quantize_rtn(weight, PER_CHANNEL)
    if tokens == 0:
        assert torch.equal(quantized.codes, plain.codes)
    else:
        assert output_error(weight, quantized, x) < 0.1 * output_error(weight, plain, x)


def test_inactive_channels_are_rounded_to_nearest_and_disturb_no_other(
    weight: torch.Tensor, inputs: torch.Tensor
) -> None:
    inactive = torch.zeros(IN, dtype=torch.bool)
    inactive[5::11] = True
    inputs = inputs.masked_fill(inactive, 0)
    quantized = quantize_gptq(weight, hessian_of(inputs), PER_CHANNEL)
    assert torch.equal(
        quantized.codes[:, inactive], quantize_rtn(weight, PER_CHANNEL).codes[:, inactive]
    )
    assert output_error(weight, quantized, inputs) < 0.5 * output_error(
        weight, quantize_rtn(weight, PER_CHANNEL), inputs
    )


def test_zero_rows_of_the_weight_stay_zero(weight: torch.Tensor, inputs: torch.Tensor) -> None:
    weight[7] = 0
    quantized = quantize_gptq(weight, hessian_of(inputs), PER_CHANNEL)
    assert (quantized.codes[7] == 0).all()
    assert quantized.scale[7] == 1


def test_asymmetric_calibration_comes_closer_to_the_full_precision_output(
    weight: torch.Tensor, inputs: torch.Tensor, generator: torch.Generator
) -> None:
    leak = torch.randn(IN, IN, generator=generator) * 0.02
    perturbed = (
        inputs + inputs @ leak
    )  # what earlier layers' errors, correlated with the input, make of it
    accumulator = HessianAccumulator(IN, asymmetric=True)
    accumulator.add(perturbed, inputs)
    symmetric = quantize_gptq(weight, accumulator.hessian, PER_CHANNEL)
    asymmetric = quantize_gptq(weight, accumulator.hessian, PER_CHANNEL, cross=accumulator.cross)
    assert output_error(weight, asymmetric, perturbed, inputs) < 0.5 * output_error(
        weight, symmetric, perturbed, inputs
    )


def test_qronos_is_its_definition(
    weight: torch.Tensor, inputs: torch.Tensor, generator: torch.Generator
) -> None:
    """Each channel is rounded, then the rest solved anew for the full-precision output; the first
    one for the rest as it was (arXiv 2505.11695, section 3)."""
    channels = 24
    weight, x = weight[:, :channels], inputs[:, :channels].double()
    served = x + 0.3 * x.std() * torch.randn(x.shape, generator=generator, dtype=x.dtype)
    accumulator = HessianAccumulator(channels, asymmetric=True)
    accumulator.add(served, x)
    found = quantize_gptq(
        weight,
        accumulator.hessian,
        PER_CHANNEL,
        act_order=False,
        damping=1e-12,
        cross=accumulator.cross,
        qronos=True,
    )
    wanted, left = x @ weight.double().T, weight.double().clone()
    step = found.scale.double().flatten()
    for t in range(channels):
        value = left[:, t]
        if t == 0:
            others = served[:, 1:] @ left[:, 1:].T
            value = served[:, 0] @ (wanted - others) / served[:, 0].square().sum()
        code = (value / step).round().clamp(-8, 7)
        assert torch.equal(found.codes[:, t].double(), code)
        wanted = wanted - served[:, t, None] * (code * step)
        left[:, t + 1 :] = torch.linalg.lstsq(served[:, t + 1 :], wanted).solution.T


def gradients(generator: torch.Generator, outputs: int) -> torch.Tensor:
    """Second moment of gradients in few directions, and a little in all."""
    few = torch.randn(TOKENS, 6, generator=generator) @ torch.randn(6, outputs, generator=generator)
    found = few + 0.1 * torch.randn(few.shape, generator=generator)
    return found.T @ found / TOKENS


@pytest.mark.parametrize("group_size", [-1, 32])
def test_output_channels_make_up_for_each_other(
    inputs: torch.Tensor, generator: torch.Generator, group_size: Literal[-1, 32]
) -> None:
    scheme = WeightScheme(group_size=group_size)
    weight = torch.randn(192, IN, generator=generator)
    hessian, moment = hessian_of(inputs), gradients(generator, len(weight))
    alone = quantize_gptq(weight, hessian, scheme)
    together = quantize_gptq(weight, hessian, scheme, outputs=moment)
    assert_same_scales(alone, together)

    def loss(found: QuantizedWeight) -> float:
        error = weight.double() - found.dequantize(torch.float64)
        return (moment.double() @ error @ hessian @ error.T).trace().item()

    assert loss(together) < 0.5 * loss(alone)


def test_blocks_of_output_channels_are_rounded_for_what_is_least(
    weight: torch.Tensor, inputs: torch.Tensor, generator: torch.Generator
) -> None:
    """The second block is rounded as the errors of the first leave it: with ``O_bb^-1 O_ba E_a``
    added, by definition of a minimum."""
    hessian, moment = hessian_of(inputs), gradients(generator, OUT).double()
    found = quantize_gptq(weight, hessian, PER_CHANNEL, outputs=moment)
    order = moment.diagonal().argsort(descending=True)
    first, second = order[:32], order[32:]
    moment += 0.1 * moment.diagonal().mean() * torch.eye(OUT)
    alone = quantize_gptq(weight, hessian, PER_CHANNEL)
    assert torch.equal(found.codes[first], alone.codes[first])
    error = (weight - found.dequantize())[first].double()
    within, across = moment[second][:, second], moment[second][:, first]
    moved = weight[second].double() + torch.linalg.solve(within, across @ error)
    # GPTQ as it is written: a channel is rounded, the others are solved for anew.
    damped = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(IN)
    left = damped.diagonal().argsort(descending=True)
    inverse, step = torch.linalg.inv(damped), found.scale[second, 0].double()
    different = 0
    for channel in left:
        code = (moved[:, channel] / step).round().clamp(-8, 7)
        different += int((code != found.codes[second, channel]).sum())
        own = found.codes[second, channel] * step
        update = inverse[channel] / inverse[channel, channel]
        moved -= (moved[:, channel] - own)[:, None] * update
        inverse -= inverse[:, channel, None] * update
    assert different < 0.002 * found.codes[second].numel()


def test_output_channels_without_relations_are_rounded_alone(
    weight: torch.Tensor, inputs: torch.Tensor, generator: torch.Generator
) -> None:
    hessian = hessian_of(inputs)
    moment = torch.rand(OUT, generator=generator).diag()
    moment[3, 3] = 0
    found = quantize_gptq(weight, hessian, PER_CHANNEL, outputs=moment)
    assert torch.equal(found.codes, quantize_gptq(weight, hessian, PER_CHANNEL).codes)


def test_asymmetric_calibration_of_unperturbed_inputs_is_gptq(
    weight: torch.Tensor, inputs: torch.Tensor
) -> None:
    accumulator = HessianAccumulator(IN, asymmetric=True)
    accumulator.add(inputs, inputs)
    asymmetric = quantize_gptq(weight, accumulator.hessian, PER_CHANNEL, cross=accumulator.cross)
    assert torch.equal(
        asymmetric.codes, quantize_gptq(weight, accumulator.hessian, PER_CHANNEL).codes
    )


def test_same_input_gives_the_same_codes_and_is_left_alone(
    weight: torch.Tensor, inputs: torch.Tensor
) -> None:
    hessian = hessian_of(inputs)
    before = weight.clone(), hessian.clone()
    first, second = (
        quantize_gptq(weight, hessian, PER_CHANNEL, cross=0.01 * hessian) for _ in range(2)
    )
    assert torch.equal(first.codes, second.codes)
    assert torch.equal(first.scale, second.scale)
    assert torch.equal(weight, before[0])
    assert torch.equal(hessian, before[1])


def test_unusable_arguments_are_refused(weight: torch.Tensor) -> None:
    with pytest.raises(ConfigError, match="group size 128"):
        quantize_gptq(weight, torch.eye(IN), WeightScheme(group_size=128))
    for broken in ({"hessian": torch.eye(IN) * torch.nan}, {"outputs": torch.eye(OUT) * torch.nan}):
        with pytest.raises(CheckpointError, match=r"layers\.0: expected a finite Hessian"):
            quantize_gptq(
                weight, scheme=PER_CHANNEL, name="layers.0", **{"hessian": torch.eye(IN)} | broken
            )
    weight[0, 0] = torch.nan
    with pytest.raises(CheckpointError, match="row 0, column 0"):
        quantize_gptq(weight, torch.eye(IN), PER_CHANNEL)
