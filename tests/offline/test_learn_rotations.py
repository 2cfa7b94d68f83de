# SPDX-License-Identifier: Apache-2.0
"""Learned rotations are orthogonal whatever happens, beat the Hadamard start where there is
something to learn, and repeat."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import pytest
import torch

from smoothrot_offline.check.verify import verify
from smoothrot_offline.config import make_config
from smoothrot_offline.convert import convert
from smoothrot_offline.decide.learned_rotations import (
    Learned,
    ReaderSample,
    learn_head_rotations,
    learn_residual_rotation,
)
from smoothrot_offline.output.manifest import read_manifest
from smoothrot_offline.report.model import load_model
from smoothrot_offline.rounding.rtn import fake_quantize_tokens, quantize_rtn
from smoothrot_offline.transform.rotation import DenseRotation, head_matrices, random_rotation
from smoothrot_vllm.format import ActivationScheme, WeightScheme

ACTIVATIONS = ActivationScheme(clip=0.9)
WEIGHTS = WeightScheme()
WIDTH = 32
KV_HEADS, GROUP, HEAD = 2, 3, 16


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """These matrices are too small for two: on a busy machine the threads would mostly wait for
    each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def planted(tokens: int, turn: torch.Tensor, seed: int) -> torch.Tensor:
    """Inputs that the Hadamard start serves badly: before ``turn``, some tokens are one huge
    entry of a rotated channel."""
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
    """By definition, from the converter's own quantizers."""
    exact = x @ weight.T
    got = fake_quantize_tokens(x, ACTIVATIONS) @ quantize_rtn(weight, weights).dequantize().T
    return float((got - exact).square().sum() / exact.square().sum())


def residual_error(
    samples: list[ReaderSample], matrix: torch.Tensor, weights: WeightScheme = WEIGHTS
) -> float:
    q = matrix.float()
    return sum(layer_error(s.inputs @ q, s.weight @ q, weights) for s in samples) / len(samples)


def assert_orthogonal(matrices: torch.Tensor) -> None:
    assert matrices.dtype == torch.float64
    identity = torch.eye(matrices.shape[-1], dtype=torch.float64)
    assert (matrices.mT @ matrices - identity).norm(dim=(-2, -1)).max() <= 1e-12


def learn_residual(samples: list[ReaderSample], start: torch.Tensor, **options: int) -> Learned:
    return learn_residual_rotation(
        samples, start, activations=ACTIVATIONS, weights=WEIGHTS, **options
    )


@pytest.fixture(scope="module")
def start() -> torch.Tensor:
    return random_rotation(WIDTH, seed=0).matrix()


@pytest.mark.parametrize("group_size", [-1, 32])
def test_r1_reduces_the_error_on_unseen_tokens(
    start: torch.Tensor, group_size: Literal[-1, 32]
) -> None:
    weights = WeightScheme(group_size=group_size)
    samples = reader_samples(start, 9, 256)
    learned = learn_residual_rotation(
        [ReaderSample(s.inputs[:128], s.weight) for s in samples],
        start,
        activations=ACTIVATIONS,
        weights=weights,
        steps=60,
    )
    assert learned.after < learned.before
    unseen = [ReaderSample(s.inputs[128:], s.weight) for s in samples]
    assert_orthogonal(learned.matrices)
    assert residual_error(unseen, learned.matrices, weights) < 0.9 * residual_error(
        unseen, start, weights
    )


class Heads:
    """An attention block's values, with outliers that its Hadamard start gathers into one
    channel of each head."""

    def __init__(self) -> None:
        self.start = head_matrices(KV_HEADS, HEAD)
        turns = self.start.repeat_interleave(GROUP, dim=0)
        self.inputs = torch.cat(
            [planted(384, turn, seed) for seed, turn in enumerate(turns)], dim=1
        )
        self.output = torch.randn(40, KV_HEADS * GROUP * HEAD, generator=generator(7))
        self.value = torch.randn(KV_HEADS * HEAD, 48, generator=generator(8))

    def learn(self, steps: int) -> Learned:
        return learn_head_rotations(
            self.inputs[:256],
            self.output,
            self.value,
            self.start,
            activations=ACTIVATIONS,
            weights=WEIGHTS,
            steps=steps,
        )

    def error(self, matrices: torch.Tensor) -> float:
        """On the tokens that :meth:`learn` does not see."""
        values, queries = (
            DenseRotation(matrices.float()),
            DenseRotation(matrices.float().repeat_interleave(GROUP, dim=0)),
        )
        value = values.rotate(self.value.T).T
        rounding = (
            quantize_rtn(value, WEIGHTS).dequantize() - value
        ).square().sum() / value.square().sum()
        return layer_error(queries.rotate(self.inputs[256:]), queries.rotate(self.output)) + float(
            rounding
        )


@pytest.fixture(scope="module")
def heads() -> Heads:
    return Heads()


def test_r2_reduces_the_error_on_unseen_tokens(heads: Heads) -> None:
    learned = heads.learn(60)
    assert_orthogonal(learned.matrices)
    assert learned.matrices.shape == (KV_HEADS, HEAD, HEAD)
    assert learned.after < learned.before
    assert heads.error(learned.matrices) < 0.9 * heads.error(heads.start)


def test_same_seed_same_matrix_other_seed_another(start: torch.Tensor, heads: Heads) -> None:
    samples = reader_samples(start, 12, 96)
    first = learn_residual(samples, start, steps=4, seed=1).matrices
    assert torch.equal(first, learn_residual(samples, start, steps=4, seed=1).matrices)
    assert not torch.equal(first, learn_residual(samples, start, steps=4, seed=2).matrices)
    assert torch.equal(heads.learn(5).matrices, heads.learn(5).matrices)


def test_start_is_kept_where_the_held_out_error_does_not_fall(
    start: torch.Tensor, heads: Heads, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights that 4 bits hold exactly at the start and nowhere else, and a step far too long."""
    monkeypatch.setattr("smoothrot_offline.decide.learned_rotations.RESIDUAL_ANGLE", 5.0)
    monkeypatch.setattr("smoothrot_offline.decide.learned_rotations.HEAD_ANGLE", 5.0)
    weight = torch.randn(40, WIDTH, generator=generator(0)).sign() @ start.float().T
    samples = [
        ReaderSample(torch.randn(64, WIDTH, generator=generator(seed)), weight) for seed in range(3)
    ]
    kept = learn_residual(samples, start, steps=1)
    assert torch.equal(kept.matrices, start)
    assert kept.after == kept.before
    back = heads.start.float().mT
    exact = Heads()
    exact.output = DenseRotation(back.repeat_interleave(GROUP, dim=0)).rotate(heads.output.sign())
    exact.value = DenseRotation(back).rotate(heads.value.sign().T).T
    assert torch.equal(exact.learn(1).matrices, heads.start)


def test_a_layer_of_zeros_is_no_error(start: torch.Tensor) -> None:
    sample = ReaderSample(torch.zeros(8, WIDTH), torch.zeros(4, WIDTH))
    assert torch.equal(learn_residual([sample], start, steps=2).matrices, start)


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
    torch.testing.assert_close(
        DenseRotation(blocks).rotate(x[0, 0]), x[0, 0] @ torch.block_diag(*blocks)
    )


LEARNED: dict[str, Any] = {
    "rotations": "learned",
    "rotation_steps": 3,
    "calib_samples": 3,
    "calib_seqlen": 16,
}


@pytest.mark.parametrize("family", ["llama", "phi3", "gemma3", "qwen3_5"])
def test_a_conversion_learns_what_can_be_folded(
    make_model: Callable[..., Path], tmp_path: Path, family: str
) -> None:
    # The classes of the others have none.
    biases = {"attention_bias": True} if family in ("llama", "gemma3") else {}
    source = make_model(family, **biases, dtype=torch.float16)
    convert(source, tmp_path / "out", make_config(weight_bits=8, activation_bits=8, **LEARNED))
    tokens = torch.arange(24).reshape(2, 12) * 7 % 96
    with torch.inference_mode():
        expected, got = (
            load_model(path, torch.float32)(tokens).logits for path in (source, tmp_path / "out")
        )
    # Linear attention of random weights is that sensitive, see test_convert.py.
    bound = 0.2 if family == "qwen3_5" else 0.05
    assert (got - expected).norm() < bound * expected.norm()
    assert verify(tmp_path / "out").ok
    rotations = read_manifest(tmp_path / "out").rotations
    assert rotations is not None
    assert rotations.learned is not None
    assert rotations.learned.steps == 3
    assert (rotations.learned.r2 is None) == (rotations.r2 is None) == (family == "qwen3_5")
    if rotations.learned.r2 is not None:
        assert rotations.learned.r2.learned <= rotations.learned.r2.hadamard
    assert (rotations.learned.r1 is None) == (family == "gemma3")


def test_conversions_with_learned_rotations_repeat(
    make_model: Callable[..., Path], tmp_path: Path
) -> None:
    source, messages = make_model(), []
    config = make_config(scales="none", sign_seeds=2, **LEARNED)
    for name in ("a", "b"):
        convert(
            source,
            tmp_path / name,
            config,
            lambda message, done, total: messages.append((message, done, total)),
        )
    convert(source, tmp_path / "c", config.model_copy(update={"rotations": "hadamard"}))
    tensors = [read_manifest(tmp_path / name).tensors for name in ("a", "b", "c")]
    assert tensors[0] == tensors[1]
    assert tensors[0] != tensors[2]
    assert [done for _, done, _ in messages] == 2 * list(range(messages[-1][2] + 1))
    assert any(message.startswith("learning R2 of layer 3") for message, _, _ in messages)


def test_nothing_is_learned_without_rotation(
    make_model: Callable[..., Path], tmp_path: Path
) -> None:
    config = make_config(rotate=False, scales="none", **LEARNED)
    assert not config.needs_calibration
    convert(make_model(), tmp_path / "out", config)
    assert read_manifest(tmp_path / "out").rotations is None
