# SPDX-License-Identifier: Apache-2.0
"""What an error costs the whole model is estimated without bias."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from stored import load_weights

from smoothrot_offline.check.verify import verify
from smoothrot_offline.config import make_config
from smoothrot_offline.convert import convert
from smoothrot_offline.decide import stages
from smoothrot_offline.distill.divergence import divergence
from smoothrot_offline.learn import decoder, fisher
from smoothrot_offline.learn.decoder import Decoder
from smoothrot_offline.report.model import load_model
from smoothrot_offline.source.checkpoint import open_checkpoint
from smoothrot_offline.source.layers import SourceModel
from smoothrot_offline.source.resolve import resolve

TOKENS = torch.arange(10)[None] * 7 % 96
TOKEN = 4
DRAWS = 100


@pytest.mark.parametrize(("family", "changed"), [("llama", 0), ("gemma3", 2), ("gemma4", 1)])
def test_the_cost_of_a_small_change_is_its_divergence(
    make_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, family: str, changed: int
) -> None:
    monkeypatch.setattr(decoder, "product_dtype", lambda _: torch.float32)
    checkpoint = open_checkpoint(make_model(family))
    source = SourceModel(checkpoint, resolve(checkpoint.config))
    model = Decoder(source)
    generator = torch.Generator().manual_seed(0)

    @torch.no_grad()
    def logits(change: torch.Tensor | None) -> torch.Tensor:
        hidden = source.embed(TOKENS)
        for index, layer in source.layers():
            hidden = model.layer(index, layer, hidden, {})
            if index == changed and change is not None:
                hidden[0, TOKEN] += change
        return model.logits(hidden)

    # Of keys and values that later layers share too.
    change = torch.randn(source.spec.stream, generator=generator)
    change *= 0.02 * logits(None).norm() / change.norm()
    exact = divergence(logits(change), logits(None)) * TOKENS.numel()

    def estimate(seed: int) -> float:
        gradients = fisher.model_gradients(source, TOKENS, seed, lambda _: None, 1).outputs
        return float(gradients[changed][0, TOKEN] @ change) ** 2 / 2

    mean = sum(map(estimate, range(DRAWS))) / DRAWS
    # Of the square of a normal number the mean of so many is 14 % from its own.
    assert mean == pytest.approx(float(exact), rel=0.35)


MANY = torch.arange(2 * fisher.AT_ONCE * 8).view(-1, 8) * 7 % 96


@pytest.mark.parametrize(
    "family", ["llama", "phi3", "gemma3", "qwen3_5", "mixtral", "qwen2_moe", "gemma4"]
)
def test_tokens_weigh_what_their_gradient_in_the_whole_model_says(
    make_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, family: str
) -> None:
    monkeypatch.setattr(decoder, "product_dtype", lambda _: torch.float32)
    directory = make_model(family)
    checkpoint = open_checkpoint(directory)
    spec = resolve(checkpoint.config)
    steps: list[str] = []
    found = fisher.model_gradients(SourceModel(checkpoint, spec), MANY, 3, steps.append).weights
    assert len(steps) == fisher.gradient_steps(len(MANY)) == 2

    model = load_model(directory, torch.float32)
    squares = [{linear: list[torch.Tensor]() for linear in own} for own in found]

    def watch(module: torch.nn.Module, parts: list[torch.Tensor]) -> None:
        def keep(gradient: torch.Tensor) -> None:
            parts.append(gradient.square().mean(-1).flatten())

        def hook(_module: torch.nn.Module, _inputs: object, out: torch.Tensor) -> None:
            out.register_hook(keep)

        module.register_forward_hook(hook)

    for index, own in enumerate(squares):
        table = spec.layer_table(index)
        assert set(own) == {
            linear
            for linear in table.linears
            if ".experts." not in linear and linear not in table.unquantized
        }
        for linear, parts in own.items():
            watch(model.get_submodule(spec.layer_prefix(index) + linear), parts)
    generator = torch.Generator().manual_seed(3)
    for one in MANY.split(1):
        log = model(one, use_cache=False).logits[0].log_softmax(-1)
        drawn = log.detach().exp().multinomial(1, generator=generator)
        log.gather(-1, drawn).sum().backward()
    for own, weights in zip(squares, found, strict=True):
        for linear, parts in own.items():
            expected = torch.cat(parts)
            torch.testing.assert_close(
                weights[linear] ** 2, expected / expected.mean(), rtol=2e-3, atol=1e-4
            )


@pytest.mark.parametrize(
    "family", ["phi3", "gemma4", "qwen3_5", "qwen2_moe", "glm4_moe", "deepseek_v3"]
)
def test_each_linear_is_rounded_by_its_own_weights(
    make_model: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str
) -> None:
    source, packed = make_model(family), dict[str, dict[str, torch.Tensor]]()
    monkeypatch.setattr(stages, "load_calibration", lambda *_: MANY)
    calibration = {"calib_samples": len(MANY), "calib_seqlen": MANY.shape[1]}
    for hessian in ("layer", "model"):
        out = tmp_path / f"by-{hessian}"
        options = {"rounding": "gptq", "hessian": hessian, "activation_bits": 8}
        convert(source, out, make_config(**calibration | options))
        assert verify(out).ok
        weights = load_weights(out)
        packed[hessian] = {name: codes for name, codes in weights.items() if "packed" in name}
    changed = {
        name
        for name, codes in packed["model"].items()
        if not torch.equal(codes, packed["layer"][name])
    }
    # Experts are given other tokens by a router that reads what the others give out.
    assert changed >= {name for name in packed["model"] if ".experts." not in name}
