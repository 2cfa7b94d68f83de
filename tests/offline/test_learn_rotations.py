# SPDX-License-Identifier: Apache-2.0
"""Learned rotations are orthogonal whatever happens, beat the Hadamard start where there is something to learn, and repeat."""

import pytest
import torch

from smoothrot_offline.quantize import quantize_rtn
from smoothrot_offline.quantize.straight_through import fake_quantize_tokens
from smoothrot_offline.rotate import DenseRotation, head_matrices, random_rotation
from smoothrot_offline.rotations import ReaderSample, learn_head_rotations, learn_residual_rotation
from smoothrot_vllm.format import ActivationScheme, WeightScheme

ACTIVATIONS = ActivationScheme(clip=0.9)
WEIGHTS = WeightScheme()
WIDTH = 32
KV_HEADS, GROUP, HEAD = 2, 3, 16


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def planted(tokens: int, turn: torch.Tensor, seed: int) -> torch.Tensor:
    """Inputs that the Hadamard start serves badly: before ``turn``, some tokens are one huge entry of a rotated channel."""
    x = torch.randn(tokens, turn.shape[-1], generator=generator(seed))
    x[::2, 3] += 30.0
    return x @ turn.float().T


def reader_samples(turn: torch.Tensor, count: int, tokens: int) -> list[ReaderSample]:
    samples = []
    for seed in range(count):
        x = planted(tokens, turn, seed)
        weight = torch.randn(24, WIDTH, generator=generator(100 + seed))
        samples.append(ReaderSample(x / x.square().mean(-1, keepdim=True).sqrt(), weight))
    return samples


def layer_error(x: torch.Tensor, weight: torch.Tensor, weights: WeightScheme = WEIGHTS) -> float:
    """By definition, from the converter's own quantisers."""
    exact = x @ weight.T
    got = fake_quantize_tokens(x, ACTIVATIONS) @ quantize_rtn(weight, weights).dequantize().T
    return float((got - exact).square().sum() / exact.square().sum())


def residual_error(samples: list[ReaderSample], matrix: torch.Tensor, weights: WeightScheme = WEIGHTS) -> float:
    q = matrix.float()
    return sum(layer_error(s.inputs @ q, s.weight @ q, weights) for s in samples) / len(samples)


def assert_orthogonal(matrices: torch.Tensor) -> None:
    assert matrices.dtype == torch.float64
    identity = torch.eye(matrices.shape[-1], dtype=torch.float64)
    assert (matrices.mT @ matrices - identity).norm(dim=(-2, -1)).max() <= 1e-12


def learn_residual(samples: list[ReaderSample], start: torch.Tensor, **options: int) -> torch.Tensor:
    return learn_residual_rotation(samples, start, activations=ACTIVATIONS, weights=WEIGHTS, **options)


@pytest.fixture(scope="module")
def start() -> torch.Tensor:
    return random_rotation(WIDTH, seed=0).matrix()


@pytest.mark.parametrize("group_size", [-1, 32])
def test_r1_reduces_the_error_on_unseen_tokens(start: torch.Tensor, group_size: int) -> None:
    weights = WeightScheme(group_size=group_size)
    samples = reader_samples(start, 9, 256)
    learned = learn_residual_rotation(
        [ReaderSample(s.inputs[:128], s.weight) for s in samples], start, activations=ACTIVATIONS, weights=weights, steps=60
    )
    unseen = [ReaderSample(s.inputs[128:], s.weight) for s in samples]
    assert_orthogonal(learned)
    assert residual_error(unseen, learned, weights) < 0.9 * residual_error(unseen, start, weights)


class Heads:
    """An attention block's values, with outliers that its Hadamard start gathers into one channel of each head."""

    def __init__(self) -> None:
        self.start = head_matrices(KV_HEADS, HEAD)
        turns = self.start.repeat_interleave(GROUP, dim=0)
        self.inputs = torch.cat([planted(384, turn, seed) for seed, turn in enumerate(turns)], dim=1)
        self.output = torch.randn(40, KV_HEADS * GROUP * HEAD, generator=generator(7))
        self.value = torch.randn(KV_HEADS * HEAD, 48, generator=generator(8))

    def learn(self, steps: int) -> torch.Tensor:
        return learn_head_rotations(
            self.inputs[:256], self.output, self.value, self.start, activations=ACTIVATIONS, weights=WEIGHTS, steps=steps
        )

    def error(self, matrices: torch.Tensor) -> float:
        """On the tokens that :meth:`learn` does not see."""
        values, queries = DenseRotation(matrices.float()), DenseRotation(matrices.float().repeat_interleave(GROUP, dim=0))
        value = values.rotate(self.value.T).T
        rounding = (quantize_rtn(value, WEIGHTS).dequantize() - value).square().sum() / value.square().sum()
        return layer_error(queries.rotate(self.inputs[256:]), queries.rotate(self.output)) + float(rounding)


@pytest.fixture(scope="module")
def heads() -> Heads:
    return Heads()


def test_r2_reduces_the_error_on_unseen_tokens(heads: Heads) -> None:
    learned = heads.learn(60)
    assert_orthogonal(learned)
    assert learned.shape == (KV_HEADS, HEAD, HEAD)
    assert heads.error(learned) < 0.9 * heads.error(heads.start)


def test_same_seed_same_matrix_other_seed_another(start: torch.Tensor, heads: Heads) -> None:
    samples = reader_samples(start, 12, 96)
    first = learn_residual(samples, start, steps=20, seed=1)
    assert torch.equal(first, learn_residual(samples, start, steps=20, seed=1))
    assert not torch.equal(first, learn_residual(samples, start, steps=20, seed=2))
    assert torch.equal(heads.learn(5), heads.learn(5))


def test_no_steps_no_change(start: torch.Tensor, heads: Heads) -> None:
    assert torch.equal(learn_residual(reader_samples(start, 2, 16), start, steps=0), start)
    assert torch.equal(heads.learn(0), heads.start)


def test_start_is_kept_where_the_held_out_error_does_not_fall(
    start: torch.Tensor, heads: Heads, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights that 4 bits hold exactly at the start and nowhere else, and a step far too long."""
    monkeypatch.setattr("smoothrot_offline.rotations.residual.ANGLE", 5.0)
    monkeypatch.setattr("smoothrot_offline.rotations.heads.ANGLE", 5.0)
    weight = torch.randn(40, WIDTH, generator=generator(0)).sign() @ start.float().T
    samples = [ReaderSample(torch.randn(64, WIDTH, generator=generator(seed)), weight) for seed in range(3)]
    assert torch.equal(learn_residual(samples, start, steps=1), start)
    back = heads.start.float().mT
    exact = Heads()
    exact.output = DenseRotation(back.repeat_interleave(GROUP, dim=0)).rotate(heads.output.sign())
    exact.value = DenseRotation(back).rotate(heads.value.sign().T).T
    assert torch.equal(exact.learn(1), heads.start)


def test_a_layer_of_zeros_is_no_error(start: torch.Tensor) -> None:
    sample = ReaderSample(torch.zeros(8, WIDTH), torch.zeros(4, WIDTH))
    assert torch.equal(learn_residual([sample], start, steps=2), start)


@pytest.mark.parametrize("size", [WIDTH, 72, 70])
def test_matrix_of_a_hadamard_rotation_is_what_it_applies(size: int) -> None:
    rotation = random_rotation(size, seed=1)
    x = torch.randn(5, size, dtype=torch.float64, generator=generator(0))
    assert_orthogonal(rotation.matrix())
    torch.testing.assert_close(DenseRotation(rotation.matrix()[None]).rotate(x), rotation.rotate(x))


def test_dense_rotation_turns_each_block_of_a_row() -> None:
    blocks = torch.randn(3, 4, 4, dtype=torch.float64, generator=generator(0))
    x = torch.randn(2, 5, 12, dtype=torch.float64, generator=generator(1))
    torch.testing.assert_close(DenseRotation(blocks).rotate(x), x @ torch.block_diag(*blocks))
    torch.testing.assert_close(DenseRotation(blocks).rotate(x[0, 0]), x[0, 0] @ torch.block_diag(*blocks))
