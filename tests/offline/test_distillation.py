# SPDX-License-Identifier: Apache-2.0
"""Distillation begins with the checkpoint that rounding wrote, changes only what may change, and
keeps only what predicts held-out text better."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from safetensors.torch import load_file

from smoothrot_offline.check.verify import verify
from smoothrot_offline.config import ConvertConfig, make_config
from smoothrot_offline.convert import convert
from smoothrot_offline.distill import training
from smoothrot_offline.distill.cost import distillation_bytes, distillation_flop
from smoothrot_offline.distill.divergence import divergence
from smoothrot_offline.distill.products import QuantizedInputs, product_dtype, quantized_product
from smoothrot_offline.distill.student import Student
from smoothrot_offline.output.manifest import Manifest, read_manifest
from smoothrot_offline.report.model import QuantizedLinear, load_model
from smoothrot_offline.rounding.rtn import fake_quantize_tokens
from smoothrot_offline.source.checkpoint import open_checkpoint
from smoothrot_offline.source.resolve import resolve
from smoothrot_vllm.format import ActivationScheme

MakeModel = Callable[..., Path]
SMALL = {"calib_samples": 64, "calib_seqlen": 24, "scales": "l2", "rounding": "rtn"}
SCHEMES: list[dict[str, Any]] = [
    {"activation_bits": 8, "lm_head_bits": 8, "keep_8bit": 0.3},
    {"activation_bits": 4, "clip_search": True},
]


def options(**others: Any) -> ConvertConfig:
    return make_config(**SMALL | others)


def stored(directory: Path) -> dict[str, torch.Tensor]:
    files = sorted(directory.glob("model-*.safetensors"))
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def student_of(directory: Path, products: torch.dtype = torch.float32) -> Student:
    dtypes = {name: tensor.dtype for name, tensor in stored(directory).items()}
    return Student(load_model(directory, torch.float32, "reference"), dtypes, products)


def converted(source: Path, out: Path, config: ConvertConfig) -> Manifest:
    convert(source, out, config)
    return read_manifest(out)


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma3", "mixtral"])
@pytest.mark.parametrize("scheme", SCHEMES, ids=["w4a8", "w4a4"])
@pytest.mark.parametrize(
    ("products", "precision"), [(torch.float32, 1e-6), (torch.bfloat16, 2**-9)], ids=str
)
def test_an_untrained_student_is_the_checkpoint(
    make_model: MakeModel,
    tmp_path: Path,
    family: str,
    scheme: dict[str, Any],
    products: torch.dtype,
    precision: float,
) -> None:
    head = {} if family != "gemma3" else {"lm_head_bits": 16}
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 8}
    sizes |= {"num_key_value_heads": 4} if family != "mixtral" else {"num_key_value_heads": 2}
    source, out = make_model(family, **sizes), tmp_path / "out"
    convert(source, out, options(group_size=32, **scheme | head))
    student = student_of(out, products)
    before = stored(out)
    for name, tensor in student.stored():
        assert torch.equal(tensor, before[name]), name
    reference = load_model(out, torch.float32, "reference")
    linears = [name for name, one in reference.named_modules() if isinstance(one, QuantizedLinear)]
    assert linears
    for name in linears:
        defined, trained = reference.get_submodule(name), student.model.get_submodule(name)
        inputs = trained._units.shape[1]
        x = torch.randn(256, inputs, generator=torch.Generator().manual_seed(0))
        expected = defined(x)
        errors = (trained(x) - expected).norm(dim=1) / expected.norm(dim=1)
        # A value half-way between two codes may go to either: of few tokens, and by one step.
        assert errors.median() <= precision, name
        assert (errors > 10 * precision).float().mean() <= 0.05, name


def test_training_lowers_the_held_out_loss_and_touches_nothing_else(
    make_model: MakeModel, tmp_path: Path
) -> None:
    source = make_model()
    recipe = {"activation_bits": 8, "lm_head_bits": 8, "keep_8bit": 0.3}
    convert(source, tmp_path / "rounded", options(**recipe))
    manifest = converted(source, tmp_path / "out", options(**recipe, distill_steps=40))
    assert manifest.distillation is not None
    assert manifest.distillation.steps == 40
    used = product_dtype(torch.device("cpu"))
    assert manifest.distillation.products == str(used).removeprefix("torch.")
    assert manifest.distillation.after < 0.95 * manifest.distillation.before
    assert verify(tmp_path / "out").ok

    before, after = stored(tmp_path / "rounded"), stored(tmp_path / "out")
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if name.endswith(("weight_scale", "norm.weight"))}

    again = converted(source, tmp_path / "again", options(**recipe, distill_steps=40))
    assert again == manifest


def test_the_loss_of_the_output_is_the_one_recorded(make_model: MakeModel, tmp_path: Path) -> None:
    source, out = make_model(), tmp_path / "out"
    seen: list[torch.Tensor] = []
    measured = training.held_out_divergence

    def watching(original: Any, student: Student, tokens: torch.Tensor) -> float:
        seen.append(tokens)
        return measured(original, student, tokens)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("smoothrot_offline.distill.distillation.held_out_divergence", watching)
        manifest = converted(source, out, options(activation_bits=8, distill_steps=10))
    assert manifest.distillation is not None
    with torch.no_grad():
        wanted, found = (
            load_model(one, torch.float32)(seen[-1]).logits.flatten(0, 1) for one in (source, out)
        )
        served = float(divergence(found, wanted))
    # A value half-way between two codes may go to either.
    assert served == pytest.approx(manifest.distillation.after, rel=0.01)
    assert manifest.distillation.after < 0.95 * manifest.distillation.before


def test_what_is_no_better_is_not_kept(
    make_model: MakeModel,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(training, "SCALE_RATE", 3.0)
    source = make_model()
    convert(source, tmp_path / "rounded", options(activation_bits=8))
    manifest = converted(source, tmp_path / "out", options(activation_bits=8, distill_steps=6))
    assert manifest.distillation is not None
    assert manifest.distillation.after >= manifest.distillation.before
    assert "the model stays as rounding left it" in caplog.text
    before, after = stored(tmp_path / "rounded"), stored(tmp_path / "out")
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_plan_counts_both_models_and_every_step(make_model: MakeModel) -> None:
    checkpoint = open_checkpoint(make_model())
    spec = resolve(checkpoint.config)
    assert distillation_bytes(spec, options()) == distillation_flop(spec, options()) == 0
    few, many = options(distill_steps=2), options(distill_steps=200)
    weights = sum(math.prod(info.shape) for info in checkpoint.tensors.values())
    assert distillation_bytes(spec, few) > 2 * 4 * weights
    assert distillation_flop(spec, many) > 10 * distillation_flop(spec, few)


def test_the_loss_and_its_gradient_are_those_of_the_definition() -> None:
    found, wanted = torch.randn(2, 300, 70, generator=torch.Generator().manual_seed(0)).unbind()
    found.requires_grad_(True)
    exact = found.detach().double().requires_grad_(True)
    p = wanted.double().softmax(-1)
    expected = (p * (p.log() - exact.log_softmax(-1))).sum(-1).mean()
    loss = divergence(found, wanted)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    (3 * loss).backward()
    (3 * expected).backward()
    assert found.grad is not None
    torch.testing.assert_close(found.grad.double(), exact.grad, rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("clip", [0.7, 1.0])
def test_gradients_are_those_of_the_quantizer_that_passes_rounding_through(
    bits: Literal[4, 8], clip: float
) -> None:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(40, 64, generator=generator)
    x[3] = 0.0
    units = torch.randint(-105, 106, (48, 64), generator=generator).float()
    scale = torch.rand(48, generator=generator) + 0.5
    upstream = torch.randn(40, 48, generator=generator)
    scheme = ActivationScheme(bits=bits, clip=clip)

    def gradients(product: Callable[..., torch.Tensor]) -> list[torch.Tensor]:
        inputs = [tensor.clone().requires_grad_(True) for tensor in (x, scale)]
        y = product(*inputs)
        return [y.detach(), *torch.autograd.grad(y, inputs, upstream)]

    inputs = QuantizedInputs(torch.float32)
    found = gradients(lambda x, scale: quantized_product(inputs(x, scheme, 0), units, scale))
    expected = gradients(lambda x, scale: fake_quantize_tokens(x, scheme) @ units.T * scale)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4 * float(other.abs().max()))


def test_an_input_that_several_linears_read_is_quantized_once() -> None:
    inputs = QuantizedInputs(torch.float32)
    x = torch.randn(4, 32)
    scheme = ActivationScheme(bits=4, clip=0.9)
    first = inputs(x, scheme, 0)
    assert inputs(x, scheme, 0) is first
    assert inputs(x, scheme, 16) is not first
    assert inputs(x, ActivationScheme(bits=8, clip=1.0), 16)[0].abs().max() == 127
    assert inputs(x.clone(), scheme, 0) is not first
