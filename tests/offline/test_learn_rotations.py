# SPDX-License-Identifier: Apache-2.0
"""Learned rotations and scales are exact folds whatever happens, lower the loss of the whole model
on text they have not seen, and repeat."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from smoothrot_offline.check.admit import admit
from smoothrot_offline.check.verify import verify
from smoothrot_offline.config import ConvertConfig, make_config
from smoothrot_offline.convert import convert
from smoothrot_offline.decide.stages import decide
from smoothrot_offline.device import CPU
from smoothrot_offline.distill.divergence import divergence
from smoothrot_offline.learn import decoder, folds
from smoothrot_offline.learn.decoder import FoldedDecoder
from smoothrot_offline.learn.folds import Folded, LearnedFolds
from smoothrot_offline.learn.learning import Learner
from smoothrot_offline.output.manifest import Manifest, read_manifest
from smoothrot_offline.report.model import load_model
from smoothrot_offline.rounding.served import InputMap, rotations
from smoothrot_offline.source.checkpoint import open_checkpoint
from smoothrot_offline.source.layers import SourceModel
from smoothrot_offline.transform.record import read_transform
from smoothrot_offline.transform.rotation import DenseRotation, Rotation, random_rotation

MakeModel = Callable[..., Path]
FAMILIES = [
    "llama",
    "phi3",
    "gemma3",
    "gemma4",
    "mixtral",
    "qwen2_moe",
    "glm4_moe",
    "deepseek_v2",
    "qwen3_5",
]
TOKENS = torch.arange(24).reshape(2, 12) * 7 % 96


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """These matrices are too small for two: on a busy machine the threads would mostly wait for
    each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Products as exact as the rest, whatever the hardware has."""
    monkeypatch.setattr(decoder, "product_dtype", lambda _: torch.float32)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def assert_orthogonal(matrices: torch.Tensor) -> None:
    assert matrices.dtype == torch.float64
    identity = torch.eye(matrices.shape[-1], dtype=torch.float64)
    assert (matrices.mT @ matrices - identity).norm(dim=(-2, -1)).max() <= 1e-12


@pytest.mark.parametrize("size", [32, 72, 70])
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


class Model:
    """A source, the decisions of a conversion of it, and folds that begin there."""

    def __init__(self, path: Path, config: ConvertConfig) -> None:
        admitted = admit(open_checkpoint(path), config, 1, CPU)
        self.source = SourceModel(open_checkpoint(path), admitted.spec)
        plain = config.model_copy(update={"rotations": "hadamard"})
        found = decide(self.source, plain, admitted.schema, lambda _: None)
        self.transform = found.transform
        self.folds = LearnedFolds(found.transform, [study.scales for study in found.studies], CPU)
        self.decoder = FoldedDecoder(self.source, found.schema)

    def turned(self) -> LearnedFolds:
        """The folds, far from where they start."""
        for seed, (name, free) in enumerate(self.folds.free.items()):
            size = 2.0 if name.startswith(("residual", "heads")) else 0.3
            free.data = size * torch.randn(free.shape, generator=generator(seed))
        return self.folds

    def rotations(self, index: int) -> dict[str, InputMap]:
        """What the decoder does to inputs, but for quantizing them."""
        return rotations(self.source.spec.layer_table(index), self.transform.online)

    def logits(self, tokens: torch.Tensor, folded: Folded) -> torch.Tensor:
        hidden = self.decoder.embedded(tokens, folded.transform)
        for index, layer in self.source.layers():
            hidden = self.decoder.folded_layer(index, layer, hidden, folded)
        return self.decoder.folded_logits(hidden, folded.transform)


LEARNED: dict[str, Any] = {
    "rotations": "learned",
    "rotation_steps": 3,
    "calib_samples": 3,
    "calib_seqlen": 16,
    "smooth_norms": True,
}


@pytest.mark.parametrize("family", FAMILIES)
def test_any_learned_fold_is_exact(
    make_model: MakeModel, monkeypatch: pytest.MonkeyPatch, family: str
) -> None:
    source = make_model(family)
    model = Model(source, make_config(**LEARNED))
    monkeypatch.setattr(model.decoder, "_quantizers", model.rotations)
    learned = model.turned()
    for name, value in learned.values(torch.float64).items():
        if name.startswith(("residual", "heads")):
            assert_orthogonal(value.detach())
    with torch.no_grad():
        found = model.logits(TOKENS, learned.folded(learned.values()))
        expected = load_model(source, torch.float32)(TOKENS).logits.flatten(0, 1)
    assert (found - expected).norm() < 1e-4 * expected.norm()


@pytest.mark.parametrize("family", FAMILIES)
def test_gradient_is_that_of_the_whole_graph(make_model: MakeModel, family: str) -> None:
    model = Model(make_model(family), make_config(**LEARNED))
    learned = model.turned()
    learner = Learner(model.decoder, learned)
    wanted = learner.original(TOKENS)
    target = model.decoder.logits(wanted)
    divergence(model.logits(TOKENS, learned.folded(learned.values())), target).backward()
    expected = {name: free.grad for name, free in learned.free.items()}
    for free in learned.free.values():
        free.grad = None
    learner.backward(TOKENS, wanted, len(TOKENS))
    for name, free in learned.free.items():
        torch.testing.assert_close(free.grad, expected[name], rtol=1e-3, atol=1e-7, msg=name)
    assert ("residual" in expected) == (family not in ("gemma3", "gemma4"))
    assert ("heads.0" in expected) == (family != "qwen3_5")
    assert "down.0" in expected
    assert any(name.startswith("norm.0") for name in expected)
    assert all(gradient is not None and gradient.norm() > 0 for gradient in expected.values())


def learned_manifest(source: Path, out: Path, **options: Any) -> Manifest:
    convert(source, out, make_config(**LEARNED | options))
    return read_manifest(out)


@pytest.mark.parametrize("family", ["llama", "phi3", "mixtral"])
def test_learning_lowers_the_loss_of_unseen_text(
    make_model: MakeModel, tmp_path: Path, family: str
) -> None:
    manifest = learned_manifest(
        make_model(family), tmp_path / "out", rotation_steps=20, calib_samples=16
    )
    assert manifest.rotations is not None
    assert manifest.rotations.learned is not None
    assert manifest.rotations.learned.steps == 20
    assert manifest.rotations.learned.after < 0.95 * manifest.rotations.learned.before
    assert verify(tmp_path / "out").ok


def test_what_is_no_better_is_not_folded(
    make_model: MakeModel,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(folds, "SCALE_RATE", 30.0)
    source = make_model()
    learned = learned_manifest(source, tmp_path / "learned")
    assert learned.rotations is not None
    assert learned.rotations.learned is not None
    assert learned.rotations.learned.after >= learned.rotations.learned.before
    folded = read_transform(tmp_path / "learned").transform
    assert isinstance(folded.residual, Rotation)
    assert folded.heads is None
    assert "Hadamard rotations and measured scales stay" in caplog.text


@pytest.mark.parametrize("family", FAMILIES)
def test_a_conversion_that_learns_is_still_the_model(
    make_model: Callable[..., Path], tmp_path: Path, family: str
) -> None:
    # The classes of the others have none.
    biases = {"attention_bias": True} if family in ("llama", "gemma3") else {}
    source = make_model(family, **biases, dtype=torch.float16)
    convert(source, tmp_path / "out", make_config(weight_bits=8, activation_bits=8, **LEARNED))
    with torch.inference_mode():
        expected, got = (
            load_model(path, torch.float32)(TOKENS).logits for path in (source, tmp_path / "out")
        )
    # Random weights of these are that sensitive, see test_function_is_kept.py.
    bound = {"qwen3_5": 0.2, "gemma4": 0.1, "glm4_moe": 0.2, "deepseek_v2": 0.1}.get(family, 0.05)
    assert (got - expected).norm() < bound * expected.norm()
    assert verify(tmp_path / "out").ok


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
    assert any(message == "learning rotations, step 3 of 3" for message, _, _ in messages)


def test_nothing_is_learned_without_rotation(
    make_model: Callable[..., Path], tmp_path: Path
) -> None:
    config = make_config(rotate=False, scales="none", **LEARNED)
    assert not config.needs_calibration
    convert(make_model(), tmp_path / "out", config)
    assert read_manifest(tmp_path / "out").rotations is None
