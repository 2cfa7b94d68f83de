# SPDX-License-Identifier: Apache-2.0
"""What a conversion decides by measurement: clips, 8-bit layers and signs, and that the output
carries the decisions."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import smoothrot_offline.decide.stages
from smoothrot_offline.check.verify import verify
from smoothrot_offline.config import make_config, make_schema
from smoothrot_offline.convert import convert
from smoothrot_offline.decide.signs import trial_loss
from smoothrot_offline.decide.study import CLIPS, LayerStudy, allocate, best_clip
from smoothrot_offline.output.manifest import read_manifest
from smoothrot_offline.report.model import load_model
from smoothrot_offline.source.checkpoint import open_checkpoint
from smoothrot_offline.source.family import ModelSpec
from smoothrot_offline.source.layers import SourceModel
from smoothrot_offline.source.resolve import resolve
from smoothrot_offline.transform.sides import ModelTransform
from smoothrot_vllm.format import ActivationScheme, QuantizationSchema, parse_schema
from smoothrot_vllm.reference import decode, quant

MakeModel = Callable[..., Path]
SMALL = {"calib_samples": 4, "calib_seqlen": 16}
TOKENS = torch.arange(48).reshape(3, 16) * 7 % 96


def schema_of(directory: Path) -> QuantizationSchema:
    return parse_schema(json.loads((directory / "config.json").read_text())["quantization_config"])


def test_best_clip_is_the_one_whose_outputs_change_least() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(200, 64, generator=generator)
    weight = torch.randn(24, 64, generator=generator)
    scheme = ActivationScheme(bits=4)

    def change(clip: float) -> float:
        codes, scale = quant(x, clip, 4)
        change = (decode(codes, 4) * scale[:, None] - x) @ weight.T
        return float((change.square().sum(1) / (x @ weight.T).square().sum(1)).sum())

    found = best_clip([(x, weight)], scheme)
    assert change(found) == pytest.approx(min(change(clip) for clip in CLIPS), rel=1e-4)
    assert found < 1.0


def test_a_clip_for_several_inputs_is_the_one_with_the_least_sum() -> None:
    generator = torch.Generator().manual_seed(0)
    plain = (
        torch.tensor([[7.0, -7.0, 7.0, 7.0]]).repeat(8, 16),
        torch.randn(4, 64, generator=generator),
    )
    spread = (torch.randn(200, 64, generator=generator), torch.randn(24, 64, generator=generator))
    scheme = ActivationScheme(bits=4)
    assert best_clip([plain], scheme) == 1.0
    alone = best_clip([spread], scheme)
    assert alone < best_clip([spread, plain] + [plain] * 20, scheme) <= 1.0
    assert best_clip([spread, (plain[0][:0], plain[1])], scheme) == alone


def test_two_valued_inputs_need_no_clip() -> None:
    x = torch.tensor([[7.0, -7.0, 7.0, 7.0]]).repeat(8, 16)
    weight = torch.randn(4, 64, generator=torch.Generator().manual_seed(0))
    assert best_clip([(x, weight)], ActivationScheme(bits=4)) == 1.0


@pytest.fixture
def spec(make_model: MakeModel) -> ModelSpec:
    return resolve(open_checkpoint(make_model()).config)


def test_eight_bits_go_where_four_cost_most_for_each_weight(spec: ModelSpec) -> None:
    groups = {group[0]: group for group in spec.architecture.input_groups()}
    weights = {
        first: sum(out * inputs for out, inputs in map(spec.linear_shape, group))
        for first, group in groups.items()
    }
    costs = {first: 1e-6 * weights[first] for first in groups}
    dear = [
        LayerStudy(sensitivity=costs),
        LayerStudy(sensitivity=costs | {"self_attn.o_proj": 1.0}),
        LayerStudy(sensitivity=costs),
    ]
    fraction = weights["self_attn.o_proj"] / (spec.layers * sum(weights.values())) * 1.01
    config = make_config(keep_8bit=fraction)
    schema = allocate(spec, config, make_schema(spec, config), dear)
    assert list(schema.overrides) == ["model.layers.1.self_attn.o_proj"]
    kept = schema.scheme("model.layers.1.self_attn.o_proj")
    assert kept is not None
    assert (kept.weights.bits, kept.activations.bits, kept.activations.clip) == (8, 8, 1.0)


@pytest.mark.parametrize(
    ("family", "fraction"),
    [("llama", 0.0), ("llama", 0.3), ("llama", 1.0), ("mixtral", 0.5), ("qwen3_5", 0.5)],
)
def test_the_share_of_eight_bit_weights_is_kept_and_groups_stay_whole(
    make_model: MakeModel, tmp_path: Path, family: str, fraction: float
) -> None:
    convert(make_model(family), tmp_path / "out", make_config(**SMALL, keep_8bit=fraction))
    schema = schema_of(tmp_path / "out")
    checkpoint = open_checkpoint(tmp_path / "out")
    spec = resolve(
        {key: value for key, value in checkpoint.config.items() if key != "quantization_config"}
    )
    kept = total = 0
    for name, out, inputs in spec.output_linears(tied=True):
        scheme = schema.scheme(name)
        if name in spec.unquantized():
            assert scheme is None
            continue
        assert scheme is not None
        total += out * inputs
        kept += out * inputs * (scheme.weights.bits == 8)
    assert kept <= fraction * total
    assert kept == total * fraction or 0 < fraction < 1
    for index in range(spec.layers):
        for groups in spec.layer_table(index).scheme_groups():
            # A server fuses what reads one input, and has one scheme for all experts of a layer.
            assert (
                len(
                    {
                        str(schema.scheme(spec.layer_prefix(index) + linear))
                        for group in groups
                        for linear in group
                    }
                )
                == 1
            )
    assert verify(tmp_path / "out").ok


def test_clips_found_are_those_of_the_output(make_model: MakeModel, tmp_path: Path) -> None:
    convert(make_model(), tmp_path / "out", make_config(**SMALL, clip_search=True))
    schema, manifest = schema_of(tmp_path / "out"), read_manifest(tmp_path / "out")
    for index, layer in enumerate(manifest.layers):
        assert layer.clips.keys() == {
            "self_attn.q_proj",
            "self_attn.o_proj",
            "mlp.gate_proj",
            "mlp.down_proj",
        }
        for linear, clip in layer.clips.items():
            assert clip in CLIPS
            scheme = schema.scheme(f"model.layers.{index}.{linear}")
            assert scheme is not None
            assert scheme.activations.clip == clip


def test_eight_bit_inputs_are_not_clipped(make_model: MakeModel, tmp_path: Path) -> None:
    convert(
        make_model(), tmp_path / "out", make_config(**SMALL, clip_search=True, activation_bits=8)
    )
    assert schema_of(tmp_path / "out").overrides == {}


@pytest.mark.parametrize("family", ["llama", "gemma2", "gemma3", "gemma4"])
def test_trial_loss_is_that_of_the_converted_model(
    make_model: MakeModel, tmp_path: Path, family: str
) -> None:
    source = make_model(family, dtype=torch.float32)
    # At 4 bits the last bits of the stored embedding turn codes, and a random model's loss with
    # them.
    config = make_config(scales="none", seed=3, weight_bits=8, activation_bits=8)
    convert(source, tmp_path / "out", config)
    checkpoint = open_checkpoint(source)
    spec = resolve(checkpoint.config)
    studies = [LayerStudy()] * spec.layers
    found = trial_loss(
        SourceModel(checkpoint, spec),
        make_schema(spec, config),
        ModelTransform.of(spec, config),
        studies,
        TOKENS,
    )
    with torch.inference_mode():
        logits = load_model(tmp_path / "out", torch.float32)(TOKENS).logits[:, :-1]
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), TOKENS[:, 1:].flatten())
    # The output's embedding and head are rounded to bfloat16.
    assert found == pytest.approx(float(expected), rel=0.005)


def test_the_seed_with_the_least_held_out_loss_is_folded(
    make_model: MakeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses = iter([3.0, 1.0, 2.0])
    held_out: list[Any] = []

    def trial(*arguments: object) -> float:
        held_out.append(arguments[-1])
        return next(losses)

    monkeypatch.setattr(smoothrot_offline.decide.stages, "trial_loss", trial)
    source = make_model()
    convert(source, tmp_path / "chosen", make_config(**SMALL, sign_seeds=3, seed=5))
    rotations = read_manifest(tmp_path / "chosen").rotations
    assert rotations is not None
    assert (rotations.seed, rotations.sign_losses) == (6, {5: 3.0, 6: 1.0, 7: 2.0})
    assert all(tokens.shape == (8, 16) for tokens in held_out)
    assert read_manifest(tmp_path / "chosen").calibration.samples == 4
    convert(source, tmp_path / "first", make_config(**SMALL, seed=5))
    first, chosen = (
        read_manifest(tmp_path / name).tensors["model.embed_tokens.weight"]
        for name in ("first", "chosen")
    )
    assert first.sha256 != chosen.sha256
