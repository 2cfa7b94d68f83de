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
from smoothrot_offline.transform.rotation import seed_for
from smoothrot_offline.transform.sides import LayerScales, ModelTransform

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
        found = fisher.model_gradients(
            source, TOKENS, seed, lambda _: None, outputs=1, linears=False, moments=False
        )
        return float(found.outputs[changed][0, TOKEN] @ change) ** 2 / 2

    mean = sum(map(estimate, range(DRAWS))) / DRAWS
    # Of the square of a normal number the mean of so many is 14 % from its own.
    assert mean == pytest.approx(float(exact), rel=0.35)


MANY = torch.arange(2 * fisher.AT_ONCE * 8).view(-1, 8) * 7 % 96


@pytest.mark.parametrize(
    "family", ["llama", "phi3", "gemma3", "qwen3_5", "mixtral", "qwen2_moe", "gemma4"]
)
def test_linears_have_their_gradients_in_the_whole_model(
    make_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, family: str
) -> None:
    monkeypatch.setattr(decoder, "product_dtype", lambda _: torch.float32)
    directory = make_model(family)
    checkpoint = open_checkpoint(directory)
    spec = resolve(checkpoint.config)
    steps: list[str] = []
    found = fisher.model_gradients(
        SourceModel(checkpoint, spec), MANY, 3, steps.append, outputs=0, linears=True, moments=True
    )
    assert len(steps) == fisher.gradient_steps(len(MANY)) == 2

    model = load_model(directory, torch.float32)
    gradients = [{linear: list[torch.Tensor]() for linear in own} for own in found.weights]

    def watch(module: torch.nn.Module, parts: list[torch.Tensor]) -> None:
        def keep(gradient: torch.Tensor) -> None:
            parts.append(gradient.flatten(0, -2))

        def hook(_module: torch.nn.Module, _inputs: object, out: torch.Tensor) -> None:
            out.register_hook(keep)

        module.register_forward_hook(hook)

    for index, own in enumerate(gradients):
        table = spec.layer_table(index)
        assert set(own) == {
            linear
            for linear in table.linears
            if ".experts." not in linear and linear not in table.unquantized
        }
        for linear, parts in own.items():
            watch(model.get_submodule(spec.layer_prefix(index) + linear), parts)
    for number, one in enumerate(MANY.split(1)):
        generator = torch.Generator().manual_seed(seed_for(3, f"next tokens/{number}"))
        log = model(one, use_cache=False).logits[0].log_softmax(-1)
        drawn = log.detach().exp().multinomial(1, generator=generator)
        log.gather(-1, drawn).sum().backward()
    for own, weights, moments in zip(gradients, found.weights, found.moments, strict=True):
        for linear, parts in own.items():
            expected = torch.cat(parts)
            squares = expected.square().mean(-1)
            moment = expected.T @ (expected / squares.clamp_min(1e-38).sqrt()[:, None])
            torch.testing.assert_close(
                weights[linear] ** 2, squares / squares.mean(), rtol=2e-3, atol=1e-4
            )
            torch.testing.assert_close(
                moments[linear], moment / moment.diagonal().mean(), rtol=2e-3, atol=1e-3
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
    for hessian in ("layer", "tokens", "model"):
        out = tmp_path / f"by-{hessian}"
        options = {"rounding": "gptq", "hessian": hessian, "activation_bits": 8}
        convert(source, out, make_config(**calibration | options))
        assert verify(out).ok
        weights = load_weights(out)
        packed[hessian] = {name: codes for name, codes in weights.items() if "packed" in name}
    for hessian, other in (("tokens", "layer"), ("model", "tokens")):
        changed = {
            name
            for name, codes in packed[hessian].items()
            if not torch.equal(codes, packed[other][name])
        }
        # Experts are given other tokens by a router that reads what the others give out; few output
        # channels are one block.
        fewest = 33 if hessian == "model" else 0
        assert changed >= {
            name
            for name, codes in packed[hessian].items()
            if ".experts." not in name and len(codes) >= fewest
        }


@pytest.mark.parametrize("family", ["llama", "phi3", "gemma3", "qwen2_moe"])
def test_moments_of_outputs_follow_the_folds(make_model: Callable[..., Path], family: str) -> None:
    """An error of a weight costs the same before and after: ``tr(O E E^T)`` of two errors that
    differ in the output alone, of which one may be measured by the other."""
    checkpoint = open_checkpoint(make_model(family))
    spec = resolve(checkpoint.config)
    transform = ModelTransform.of(spec, make_config(scales="l2"))
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    scales = LayerScales(random(sum(spec.down_widths(0))).exp())
    layer = {name: one.double() for name, one in SourceModel(checkpoint, spec).layer(0).items()}
    linears = spec.layer_table(0).linears
    moments = {linear: random(spec.linear_shape(linear)[0], 3) for linear in linears}
    moments = {linear: half @ half.T for linear, half in moments.items()}
    found = transform.output_moments(0, layer, scales, moments)
    assert found.keys() == linears.keys()

    def folded(errors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        changed = dict(layer)
        for linear, error in errors.items():
            changed[f"{linear}.weight"] = changed[f"{linear}.weight"] + error
        transform.layer(0, changed, scales)
        return changed

    vectors = [{linear: random(len(moments[linear])) for linear in linears} for _ in range(2)]
    inputs = {linear: random(spec.linear_shape(linear)[1]) for linear in linears}
    plain = folded({})
    errors = [
        folded({linear: own[linear].outer(inputs[linear]) for linear in linears}) for own in vectors
    ]
    for linear, moment in moments.items():
        before = [own[linear] @ moment @ own[linear] for own in vectors]
        after = [
            torch.trace(found[linear] @ change @ change.T)
            for change in (own[f"{linear}.weight"] - plain[f"{linear}.weight"] for own in errors)
        ]
        torch.testing.assert_close(after[0] / after[1], before[0] / before[1], rtol=1e-9, atol=0.0)
