# SPDX-License-Identifier: Apache-2.0
"""Smoothing of what the norms give out: the scales, where they are stored, and that a conversion
carries them."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from stored import load_weights

from smoothrot_offline.check.verify import verify
from smoothrot_offline.config import make_config
from smoothrot_offline.convert import convert
from smoothrot_offline.decide.smoothing import NormStatistics
from smoothrot_offline.output.manifest import read_manifest
from smoothrot_offline.source.checkpoint import Checkpoint, open_checkpoint
from smoothrot_offline.source.family import ModelSpec
from smoothrot_offline.source.resolve import resolve
from smoothrot_offline.transform.record import read_transform
from smoothrot_offline.transform.rotation import random_rotation

CALIBRATION = {"calib_samples": 4, "calib_seqlen": 16}
NORM = "input_layernorm"


def first_layer(checkpoint: Checkpoint, spec: ModelSpec) -> dict[str, torch.Tensor]:
    return {
        name: tensor.double()
        for name, tensor in checkpoint.load_relative(
            spec.layer_prefix(0), spec.layer_tensors(0)
        ).items()
    }


@pytest.mark.parametrize("folded", [True, False], ids=["R1 folded", "not rotated"])
def test_scales_even_out_inputs_against_weights(
    make_model: Callable[..., Path], folded: bool
) -> None:
    checkpoint = open_checkpoint(make_model())
    spec = resolve(checkpoint.config)
    layer = first_layer(checkpoint, spec)
    residual = random_rotation(spec.hidden, 3) if folded else None
    statistics = NormStatistics(spec, spec.architecture, residual, layer)
    x = torch.randn(50, spec.hidden) + 3 * torch.randn(
        spec.hidden
    )  # what all tokens share is what a rotation leaves uneven
    for part in x.split(20):
        statistics.observers()[NORM](part)
    scales = statistics.scales(layer, torch.float64)[NORM]

    out = (
        x.double()
        / (x.double().square().mean(dim=1, keepdim=True) + spec.config.rms_norm_eps).sqrt()
    )
    weight = torch.cat([layer[f"{reader}.weight"] for reader in spec.architecture.readers[NORM]])
    gamma = layer[f"{NORM}.weight"]
    if residual is None:
        out = out * gamma
    else:
        out, weight = residual.rotate(out), residual.rotate(weight * gamma)
    expected = (out.norm(dim=0) / weight.norm(dim=0)).sqrt()
    torch.testing.assert_close(scales, expected / expected.log().mean().exp(), rtol=1e-6, atol=0)
    # They make least what the errors of both quantizers grow with.
    cost = lambda s: float((out / s).square().sum() * (weight * s).square().sum())  # noqa: E731
    for other in (torch.ones_like(scales), scales.square(), scales.sqrt()):
        assert cost(scales) < cost(other)


def test_a_channel_that_is_never_used_is_left_alone(make_model: Callable[..., Path]) -> None:
    checkpoint = open_checkpoint(make_model())
    spec = resolve(checkpoint.config)
    layer = first_layer(checkpoint, spec)
    layer[f"{NORM}.weight"][5] = 0.0
    statistics = NormStatistics(spec, spec.architecture, None, layer)
    statistics.observers()[NORM](torch.randn(8, spec.hidden))
    scales = statistics.scales(layer, torch.bfloat16)[NORM]
    assert scales[5] == 1.0
    assert scales.isfinite().all()
    unseen = NormStatistics(spec, spec.architecture, None, layer).scales(layer, torch.bfloat16)
    assert all(torch.equal(own, torch.ones_like(own)) for own in unseen.values())


@pytest.mark.parametrize("family", ["llama", "gemma3"])
@pytest.mark.parametrize(
    "options", [{}, {"sign_seeds": 2}, {"rotations": "learned", "rotation_steps": 2}], ids=str
)
def test_a_conversion_stores_what_it_divides_by(
    make_model: Callable[..., Path], tmp_path: Path, family: str, options: dict[str, int | str]
) -> None:
    source = make_model(family)
    config = make_config(
        smooth_norms=True, weight_bits=8, activation_bits=8, **options, **CALIBRATION
    )
    convert(source, tmp_path / "out", config)
    assert verify(tmp_path / "out").problems == []
    recorded = read_transform(tmp_path / "out")
    spec, table = recorded.transform.spec, recorded.transform.spec.architecture
    stored, original = (
        load_weights(tmp_path / "out"),
        load_file(source / "model.safetensors"),
    )
    for index, layer in enumerate(read_manifest(tmp_path / "out").layers):
        prefix = spec.layer_prefix(index)
        for norm in table.readers:
            scales = recorded.scales[index].norms[norm]
            gamma = original[f"{prefix}{norm}.weight"].double() + table.norm_offset
            gives = gamma if recorded.transform.residual is None else torch.ones_like(gamma)
            # Bit for bit: the scales were chosen so.
            torch.testing.assert_close(
                stored[f"{prefix}{norm}.weight"].double() + table.norm_offset,
                gives / scales,
                rtol=1e-14,
                atol=0,
            )
            found = layer.norm_scales[norm]
            assert (found.smallest, found.largest) == (float(scales.min()), float(scales.max()))
            assert found.smallest < 1 < found.largest


def test_without_smoothing_the_norms_stay(make_model: Callable[..., Path], tmp_path: Path) -> None:
    convert(
        make_model(),
        tmp_path / "out",
        make_config(smooth_norms=True, scales="none", rounding="gptq", **CALIBRATION),
    )
    assert all(not layer.norm_scales for layer in read_manifest(tmp_path / "out").layers)
