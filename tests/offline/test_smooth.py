# SPDX-License-Identifier: Apache-2.0
"""Smoothing scales: each policy follows its formula, and the layer error it claims is the one
that is there."""

import pytest
import torch

from smoothrot_offline.decide.policies import (
    SAMPLE_TOKENS,
    InputStatistics,
    LayerError,
    Policy,
    PolicyOptions,
    choose_scales,
)
from smoothrot_vllm import reference
from smoothrot_vllm.format import ActivationScheme, LinearScheme, WeightScheme

SCHEME = LinearScheme(weights=WeightScheme(), activations=ActivationScheme(clip=0.9))
HIDDEN, WIDTH, BLOCK = 96, 192, 96


def statistics_of(*batches: torch.Tensor) -> InputStatistics:
    statistics = InputStatistics(batches[0].shape[1], sum(len(batch) for batch in batches))
    for batch in batches:
        statistics.update(batch)
    return statistics


@pytest.fixture(scope="module")
def outlier_layer() -> tuple[InputStatistics, LayerError]:
    """Channels of very different size, and one massive token, in both X and the statistics."""
    generator = torch.Generator().manual_seed(0)
    x = (
        torch.randn(1024, WIDTH, generator=generator)
        * torch.randn(WIDTH, generator=generator).exp()
    )
    x[0, 3] = 500.0
    weight = (
        torch.randn(HIDDEN, WIDTH, generator=generator)
        * torch.randn(WIDTH, generator=generator).mul(0.5).exp()
    )
    statistics = statistics_of(x)
    return statistics, LayerError(statistics.sample, weight, SCHEME, BLOCK)


def test_statistics_are_those_of_all_batches_together() -> None:
    x = torch.randn(300, 5, generator=torch.Generator().manual_seed(0))
    statistics = statistics_of(*x.split(70))
    assert statistics.tokens == 300
    assert torch.equal(statistics.largest, x.abs().amax(0))
    torch.testing.assert_close(statistics.norm, x.double().norm(dim=0))
    assert torch.equal(statistics.sample, x)
    torch.testing.assert_close(statistics.quantile(0.9), x.abs().sort(dim=0).values[269])


def test_sample_keeps_the_first_token_of_sequences_as_often_as_any_other() -> None:
    tokens, seqlen = 64 * SAMPLE_TOKENS, 512
    positions = torch.arange(tokens)[:, None].float() % seqlen
    statistics = InputStatistics(1, tokens)
    for batch in positions.split(4096):
        statistics.update(batch)
    counts = statistics.sample.long().flatten().bincount(minlength=seqlen)
    assert torch.equal(statistics.sample, statistics.sampled(positions))
    assert counts.max() - counts.min() <= 1
    assert abs(len(statistics.sample) - SAMPLE_TOKENS) < SAMPLE_TOKENS // 32


def test_policies_follow_their_formulas_and_leave_dead_channels_alone() -> None:
    x = torch.tensor([[1.0, -16.0, 0.0, 3.0], [-4.0, 2.0, 0.0, 5.0]])
    weight = torch.tensor([[-1.0, 4.0, 2.0, 0.0], [0.5, -1.0, 2.0, 0.0]])
    statistics = statistics_of(x)
    error = LayerError(statistics.sample, weight, SCHEME, 0)

    def scales(policy: Policy, **options: float) -> list[float]:
        return choose_scales(policy, statistics, error, PolicyOptions(**options)).scales.tolist()

    assert scales("max", alpha=0.5) == [2.0, 2.0, 1.0, 1.0]
    assert scales("max", alpha=1.0) == [4.0, 16.0, 1.0, 1.0]
    assert scales("quantile", alpha=1.0, quantile=0.5) == [1.0, 2.0, 1.0, 1.0]
    norms = x.double().norm(dim=0) / weight.double().norm(dim=0)
    assert scales("l2") == pytest.approx([*norms[:2].sqrt().tolist(), 1.0, 1.0])


def test_layer_error_is_that_of_the_reference_ops(
    outlier_layer: tuple[InputStatistics, LayerError],
) -> None:
    _, error = outlier_layer
    scales = torch.rand(WIDTH, generator=torch.Generator().manual_seed(1)) + 0.5
    from smoothrot_offline.rounding.rtn import quantize_rtn
    from smoothrot_offline.transform.rotation import hadamard

    weight = quantize_rtn(hadamard(error.weight * scales, BLOCK), SCHEME.weights)
    codes, scale = reference.hadamard_quant(
        error.sample / scales, BLOCK, SCHEME.activations.clip, 4
    )
    served = reference.gemm(
        codes,
        scale,
        reference.pack_int4(weight.codes),
        weight.scale,
        weight.group_scale,
        None,
        torch.float32,
        4,
        4,
    )
    expected = (served - error.sample @ error.weight.T).square().sum().item()
    assert error.of(scales) == pytest.approx(expected, rel=1e-3)
    assert error.differentiable(scales, error.shrink(scales)).item() == pytest.approx(
        expected, rel=1e-3
    )


def test_searched_scales_beat_the_fixed_ones_and_learned_the_searched(
    outlier_layer: tuple[InputStatistics, LayerError],
) -> None:
    statistics, error = outlier_layer
    policies: tuple[Policy, ...] = ("max", "quantile", "l2", "search", "learned")
    choices = {
        policy: choose_scales(policy, statistics, error, PolicyOptions()) for policy in policies
    }
    reference_error = error.of(choices["max"].scales)
    for choice in choices.values():
        assert choice.error == pytest.approx(error.of(choice.scales) / reference_error)
    assert choices["max"].error == 1.0
    assert choices["search"].error <= min(
        choices[policy].error for policy in ("max", "quantile", "l2")
    )
    assert choices["search"].error < 0.88
    assert choices["learned"].error < choices["search"].error
    start = choices["learned"].start
    assert start is not None
    assert torch.equal(start, choices["search"].scales)
    ratio = choices["learned"].scales / start
    assert ratio.max() <= 2.0
    assert ratio.min() >= 0.5
    assert not torch.equal(choices["learned"].scales, start)


def test_an_input_of_zeros_gets_scales_of_one() -> None:
    statistics = statistics_of(torch.zeros(8, WIDTH))
    error = LayerError(statistics.sample, torch.ones(HIDDEN, WIDTH), SCHEME, BLOCK)
    choice = choose_scales("learned", statistics, error, PolicyOptions())
    assert torch.equal(choice.scales, torch.ones(WIDTH, dtype=torch.float64))
    assert choice.error == 1.0
