# SPDX-License-Identifier: Apache-2.0
"""Presets: what each sets, that options given win, and which one is chosen when nobody chooses."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from stored import load_weights
from typer.testing import CliRunner

import smoothrot_offline.presets
from smoothrot_offline.cli import app
from smoothrot_offline.config import make_schema
from smoothrot_offline.output.manifest import read_manifest
from smoothrot_offline.presets import PRESETS, REASONABLE_SECONDS, choose_preset
from smoothrot_offline.source.checkpoint import open_checkpoint
from smoothrot_offline.source.headers import side_files
from smoothrot_offline.source.resolve import resolve
from smoothrot_vllm.errors import CheckpointError, ConfigError

MakeModel = Callable[..., Path]


@pytest.mark.parametrize("name", PRESETS)
def test_preset_takes_the_first_group_size_that_fits(make_model: MakeModel, name: str) -> None:
    odd, even = (
        make_model(),
        make_model(
            name="even",
            hidden_size=256,
            intermediate_size=512,
            num_attention_heads=8,
            num_key_value_heads=2,
        ),
    )
    assert choose_preset(name, {}, open_checkpoint(odd)).config.group_size == -1
    config = choose_preset(name, {}, open_checkpoint(even)).config
    assert config.group_size == PRESETS[name].group_sizes[0]
    assert config.preset == name


def test_eight_bit_weights_fall_to_a_scale_per_channel(make_model: MakeModel) -> None:
    source = open_checkpoint(make_model(hidden_size=288, intermediate_size=320))
    choice = choose_preset("best", {"weight_bits": 8}, source)
    assert choice.config.group_size == -1
    assert any("--group-size 32 with --weight-bits 8" in note for note in choice.notes)
    make_schema(resolve(source.config), choice.config)


def test_a_family_without_a_head_keeps_its_embedding_for_it(make_model: MakeModel) -> None:
    model = open_checkpoint(make_model("gemma2"))
    assert choose_preset("best", {}, model).config.lm_head_bits == 16
    config = choose_preset("best", {"lm_head_bits": 8}, model).config
    with pytest.raises(ConfigError, match=r"--lm-head-bits 8: expected 16.*Gemma2ForCausalLM"):
        make_schema(resolve(model.config), config)


def test_a_family_without_norms_to_smooth_gets_none_smoothed(make_model: MakeModel) -> None:
    model = open_checkpoint(make_model("olmo2"))
    assert not choose_preset("best", {}, model).config.smooth_norms
    with pytest.raises(ConfigError, match=r"--smooth-norms: .*Olmo2ForCausalLM"):
        make_schema(
            resolve(model.config), choose_preset("best", {"smooth_norms": True}, model).config
        )


def test_options_given_win_over_the_presets(make_model: MakeModel) -> None:
    config = choose_preset(
        "best",
        {"rounding": "rtn", "group_size": -1, "sign_seeds": 2},
        open_checkpoint(make_model()),
    ).config
    assert (config.rounding, config.group_size, config.sign_seeds, config.scales) == (
        "rtn",
        -1,
        2,
        "l2",
    )


@pytest.mark.parametrize("name", PRESETS)
def test_norms_are_smoothed_for_four_bit_inputs_only(make_model: MakeModel, name: str) -> None:
    model = open_checkpoint(make_model())
    assert choose_preset(name, {}, model).config.smooth_norms
    assert not choose_preset(name, {"activation_bits": 8}, model).config.smooth_norms
    assert choose_preset(
        name, {"activation_bits": 8, "smooth_norms": True}, model
    ).config.smooth_norms
    assert not choose_preset("paper-compat", {}, model).config.smooth_norms


def test_presets_distill_what_fits_into_memory_twice(
    make_model: MakeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = open_checkpoint(make_model())
    for name in ("balanced", "best"):
        wanted = PRESETS[name].options["distill_steps"]
        choice = choose_preset(name, {}, model)
        assert choice.config.distill_steps == wanted > 0
        assert not any("distilled" in note for note in choice.notes)
    assert choose_preset("fast", {}, model).config.distill_steps == 0

    monkeypatch.setattr(smoothrot_offline.presets, "MOST_DISTILLED", 1000)
    choice = choose_preset("best", {}, model)
    assert choice.config.distill_steps == 0
    assert any("best: the rounded model is not distilled: 0.0 billion" in n for n in choice.notes)
    assert choose_preset("best", {"distill_steps": 7}, model).config.distill_steps == 7
    assert not any("distilled" in note for note in choose_preset("fast", {}, model).notes)


@pytest.mark.parametrize(
    ("seconds", "expected"), [((1.0,), "best"), ((9e9, 1.0), "balanced"), ((9e9, 9e9, 9e9), "fast")]
)
def test_auto_is_the_best_that_takes_reasonable_time(
    make_model: MakeModel,
    monkeypatch: pytest.MonkeyPatch,
    seconds: tuple[float, ...],
    expected: str,
) -> None:
    estimates = iter(seconds)
    monkeypatch.setattr(smoothrot_offline.presets, "estimate_seconds", lambda *_: next(estimates))
    choice = choose_preset("auto", {}, open_checkpoint(make_model()))
    assert choice.config.preset == expected
    assert f"preset {expected}" in choice.reason
    assert REASONABLE_SECONDS == 3600


def test_command_line_says_what_was_chosen_and_keeps_what_was_given(
    make_model: MakeModel, tmp_path: Path
) -> None:
    arguments = ["run", str(make_model()), str(tmp_path / "out"), "--preset", "balanced"]
    arguments += ["--activation-bits", "8", "--calib-samples", "2", "--calib-seqlen", "16"]
    arguments += ["--no-rotate"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.stderr
    assert "preset balanced, as asked for: W4A8 per channel, gptq, scales l2" in result.stderr
    config = read_manifest(tmp_path / "out").config
    assert (config.preset, config.rounding, config.activation_bits, config.rotate) == (
        "balanced",
        "gptq",
        8,
        False,
    )
    assert config.calib_samples == 2


def test_share_of_eight_bit_weights_is_given_as_auto_fraction(
    make_model: MakeModel, tmp_path: Path
) -> None:
    command = [
        "run",
        str(make_model()),
        str(tmp_path / "out"),
        "--preset",
        "none",
        "--calib-samples",
        "2",
        "--calib-seqlen",
        "8",
    ]
    assert CliRunner().invoke(app, [*command, "--keep-8bit", "half"]).exit_code == 2
    assert CliRunner().invoke(app, [*command, "--keep-8bit", "auto:0.25"]).exit_code == 0
    assert read_manifest(tmp_path / "out").config.keep_8bit == 0.25


def test_an_embedding_model_keeps_its_hidden_states(make_model: MakeModel, tmp_path: Path) -> None:
    source = make_model("qwen3")
    (source / "modules.json").write_text(
        '[{"path": ""}, {"path": "."}, {"path": "1_Pooling"}, {"path": "2_Dense"}]'
    )
    (source / "1_Pooling").mkdir()
    (source / "1_Pooling" / "config.json").write_text('{"pooling_mode_lasttoken": true}')
    (source / "2_Dense").mkdir()
    for name in ("config.json", "model.safetensors", "pytorch_model.bin"):
        (source / "2_Dense" / name).write_text(name)
    found = side_files(source)
    assert found.left == {"2_Dense/pytorch_model.bin": "pickle"}
    dense = {"2_Dense/config.json", "2_Dense/model.safetensors"}
    beside = {"1_Pooling/config.json", "generation_config.json", "modules.json", *dense}
    assert {str(file) for file in found.copied} == beside
    choice = choose_preset("best", {}, open_checkpoint(source))
    assert choice.config.residual == "online"
    assert choice.config.distill_steps == 0
    assert any("modules.json" in note for note in choice.notes)
    assert any("not distilled" in note for note in choice.notes)
    given = choose_preset("best", {"residual": "folded"}, open_checkpoint(source))
    assert given.config.residual == "folded"
    result = CliRunner().invoke(
        app, ["run", str(source), str(tmp_path / "out"), "--preset", "none", "--scales", "none"]
    )
    assert result.exit_code == 0, result.output
    before, after = (load_weights(path) for path in (source, tmp_path / "out"))
    kept = [name for name in before if "norm" in name or "embed" in name or "lm_head" in name]
    assert all(torch.equal(before[name], after[name]) for name in kept)
    assert (tmp_path / "out" / "1_Pooling" / "config.json").read_text() == (
        source / "1_Pooling" / "config.json"
    ).read_text()
    (source / "modules.json").write_text("{}x")
    with pytest.raises(CheckpointError, match=r"modules\.json: expected a list of modules"):
        choose_preset("best", {}, open_checkpoint(source))
