# SPDX-License-Identifier: Apache-2.0
"""The target of asymmetric calibration: how much of earlier layers' errors a weight makes up for, judged by unseen tokens."""

import pytest
import torch

from smoothrot_offline.quantize import HessianAccumulator, asymmetric_target, quantize_gptq
from smoothrot_vllm.format import WeightScheme

OUT, IN, TOKENS, UNSEEN = 48, 192, 1024, 4096


def draw(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


WEIGHT = draw(0, OUT, IN)
MIX = draw(1, 32, IN)
# What earlier layers make of an input: an error that follows it, which a weight can undo.
LEAK = 0.02 * draw(2, IN, IN)


def inputs(seed: int, tokens: int) -> torch.Tensor:
    """Correlated tokens: a mix of 32 factors, and noise."""
    return draw(seed, tokens, 32) @ MIX + draw(seed + 1, tokens, IN)


def gathered(x: torch.Tensor, full_precision: torch.Tensor) -> HessianAccumulator:
    statistics = HessianAccumulator(IN, asymmetric=True)
    for served, exact in zip(x.split(128), full_precision.split(128), strict=True):
        statistics.add(served, exact)
    return statistics


def error(weight: torch.Tensor, x: torch.Tensor, full_precision: torch.Tensor) -> float:
    """Relative to the outputs, squared."""
    y = full_precision.double() @ WEIGHT.double().T
    return ((x.double() @ weight.double().T - y).square().sum() / y.square().sum()).item()


def test_an_error_that_follows_the_input_is_made_up_for_on_unseen_tokens() -> None:
    seen, unseen = inputs(3, TOKENS), inputs(5, UNSEEN)
    target = asymmetric_target(WEIGHT, gathered(seen + seen @ LEAK, seen))
    assert error(target, unseen + unseen @ LEAK, unseen) < 0.1 * error(WEIGHT, unseen + unseen @ LEAK, unseen)


def test_rounding_keeps_what_the_target_gained() -> None:
    seen, unseen = inputs(3, TOKENS), inputs(5, UNSEEN)
    statistics = gathered(seen + seen @ LEAK, seen)
    plain, aimed = (
        quantize_gptq(weight, statistics.total().hessian, WeightScheme()).dequantize()
        for weight in (WEIGHT, asymmetric_target(WEIGHT, statistics))
    )
    assert error(aimed, unseen + unseen @ LEAK, unseen) < 0.5 * error(plain, unseen + unseen @ LEAK, unseen)


@pytest.mark.parametrize("tokens", [IN // 2, 2 * IN, 8 * IN])
def test_noise_that_tells_nothing_of_the_input_is_not_followed(tokens: int) -> None:
    seen, unseen = inputs(3, tokens), inputs(5, UNSEEN)
    noisy = seen + 0.5 * draw(7, tokens, IN)
    statistics = gathered(seen, noisy)
    target = asymmetric_target(WEIGHT, statistics)
    moments = statistics.total()
    fitted = (
        WEIGHT.double()
        + torch.linalg.lstsq(moments.hessian + 0.003 * torch.eye(IN), (WEIGHT.double() @ moments.cross).T).solution.T
    )
    # The answer is the weight itself. Least squares follows the noise, the more the fewer tokens there are.
    assert error(target, unseen, unseen) < 0.2 * error(fitted, unseen, unseen)


def test_fewer_tokens_are_followed_less() -> None:
    """Half of the error follows the input, half is noise: what is made up for grows with the tokens, and never harms."""
    unseen = inputs(5, UNSEEN)
    left = []
    for tokens in (IN // 2, 2 * IN, 16 * IN):
        seen = inputs(3, tokens)
        target = asymmetric_target(WEIGHT, gathered(seen + seen @ LEAK, seen + 0.5 * draw(7, tokens, IN)))
        left.append(error(target, unseen + unseen @ LEAK, unseen) / error(WEIGHT, unseen + unseen @ LEAK, unseen))
    assert 1.0 > left[0] > left[1] > left[2]


def test_exact_inputs_leave_the_weight_as_it_is() -> None:
    seen = inputs(3, TOKENS)
    assert torch.equal(asymmetric_target(WEIGHT, gathered(seen, seen)), WEIGHT)


@pytest.mark.parametrize("tokens", [0, 1])
def test_a_half_without_tokens_leaves_the_weight_as_it_is(tokens: int) -> None:
    statistics = HessianAccumulator(IN, asymmetric=True)
    statistics.add(inputs(3, tokens), inputs(5, tokens))
    assert torch.equal(asymmetric_target(WEIGHT, statistics), WEIGHT)


def test_dead_channels_and_inputs_that_are_all_zero_are_no_obstacle() -> None:
    seen = inputs(3, TOKENS)
    seen[:, 7] = 0
    target = asymmetric_target(WEIGHT, gathered(seen, 1.1 * seen))
    assert target.isfinite().all()
    assert torch.equal(target[:, 7], WEIGHT[:, 7].double())
    nothing = torch.zeros(TOKENS, IN)
    assert torch.equal(asymmetric_target(WEIGHT, gathered(nothing, seen)), WEIGHT)
