# SPDX-License-Identifier: Apache-2.0
"""gpt-oss: MXFP4 experts are worth what transformers makes of them, clamped activations and biases
convert, and what differs between transformers and the server is refused."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from packers import MXFP4_CONFIG, pack_mxfp4
from refusal import edit_config, edit_weights
from tiny_models import yarn
from transformers import GptOssConfig
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts

import smoothrot_offline.decide.stages
from smoothrot_offline.check.admit import admit
from smoothrot_offline.check.plan import plan_conversion
from smoothrot_offline.check.verify import compare_with_source, verify
from smoothrot_offline.config import make_config
from smoothrot_offline.convert import convert
from smoothrot_offline.presets import choose_preset
from smoothrot_offline.report.model import load_model
from smoothrot_offline.source.checkpoint import open_checkpoint
from smoothrot_offline.source.experts import Expert
from smoothrot_offline.source.mixtures import GPT_OSS
from smoothrot_offline.source.resolve import resolve
from smoothrot_vllm.errors import CheckpointError, ConfigError, UnsupportedModelError

MakeModel = Callable[..., Path]
OPTIONS = make_config(scales="none")
TOKENS = torch.arange(40).reshape(2, 20) * 31 % 96
SIZES = {"family": "gpt_oss", "hidden_size": 96, "intermediate_size": 64, "head_dim": 32}
"""Whole blocks of 32 inputs."""
BLOCKS = "model.layers.1.mlp.experts.gate_up_proj_blocks"
SCALES = "model.layers.1.mlp.experts.down_proj_scales"


def test_mxfp4_weights_are_worth_what_transformers_makes_of_them(make_model: MakeModel) -> None:
    source = make_model(**SIZES)
    worth = pack_mxfp4(source)
    checkpoint = open_checkpoint(source)
    assert "quantization_config" not in checkpoint.config
    for name, stack in worth.items():
        layer = name.rpartition(".")[0]
        for expert in range(4):
            gate, up, down = (f"{layer}.{expert}.{part}.weight" for part in ("w1", "w3", "w2"))
            if name.endswith("down_proj"):
                assert torch.equal(checkpoint.load([down])[down], stack[expert].T.float())
                continue
            loaded = checkpoint.load([gate, up])
            assert torch.equal(loaded[gate], stack[expert, :, 0::2].T.float())
            assert torch.equal(loaded[up], stack[expert, :, 1::2].T.float())


def test_mxfp4_experts_convert_to_the_bytes_of_their_16_bit_form(
    make_model: MakeModel, tmp_path: Path
) -> None:
    source, plain = make_model(**SIZES), make_model(name="plain", **SIZES)
    worth = pack_mxfp4(source)
    edit_weights(plain, lambda tensors: tensors.update(worth))
    plan = plan_conversion(open_checkpoint(source), OPTIONS)
    assert plan.refusals == []
    assert plan.source_bytes is not None
    weights = plan.source_bytes.linears
    unpacked = plan_conversion(open_checkpoint(plain), OPTIONS).source_bytes
    assert unpacked is not None
    experts = 3 * 4 * 3 * 96 * 64
    assert unpacked.linears - weights == experts * 2 - experts * 17 // 32
    notes = admit(open_checkpoint(source), OPTIONS).notes
    assert any(
        "36 weights are read from MXFP4 ones: the output is at best as" in note for note in notes
    )
    convert(source, tmp_path / "out", OPTIONS)
    convert(plain, tmp_path / "expected", OPTIONS)
    assert verify(tmp_path / "out").ok
    assert compare_with_source(tmp_path / "out", source).problems == []
    files = sorted((tmp_path / "expected").glob("*.safetensors"))
    assert len(files) == 5
    for file in files:
        assert (tmp_path / "out" / file.name).read_bytes() == file.read_bytes()


def first_to(name: str, value: int) -> Callable[[dict[str, torch.Tensor]], object]:
    return lambda tensors: tensors[name].view(-1)[:1].fill_(value)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (first_to(SCALES, 255), r"experts\.0\.w2\.weight: expected finite values, got 32 NaN"),
        (lambda t: t.pop(SCALES), r"w2\.scales: expected U8 \(96, 2\) beside .*MXFP4.*got none"),
        (
            lambda t: t.update({SCALES: t[SCALES][:, :, :1].contiguous()}),
            r"w2\.scales: expected U8 \(96, 2\) beside .* got U8 \(96, 1\)",
        ),
        (
            lambda t: t.update({BLOCKS: t[BLOCKS][..., :8].contiguous()}),
            r"w1\.blocks: expected U8 \(64, 3, 16\) beside .* got U8 \(64, 3, 8\)",
        ),
        (
            lambda t: t.update({BLOCKS: t[BLOCKS][:, 1:].contiguous()}),
            r"blocks of all experts of a layer, \(experts, 2 \* width, blocks, bytes\), got",
        ),
        (
            lambda t: t.update({BLOCKS.removesuffix("_blocks"): torch.ones(4, 96, 128)}),
            r"w1\.weight: expected the weight once, got .*w1\.blocks, the same in MXFP4",
        ),
        (
            lambda t: t.update({BLOCKS.replace("blocks", "bias"): torch.ones(4, 128, 1)}),
            r"gate_up_proj_bias: expected the bias of all experts .*\(experts, 2 \* width\), got",
        ),
    ],
    ids=[
        "a scale that is no number",
        "no scales",
        "scales of fewer blocks",
        "short blocks",
        "odd rows",
        "both forms",
        "a bias of three sizes",
    ],
)
def test_mxfp4_experts_that_are_not_whole_are_refused(
    make_model: MakeModel,
    tmp_path: Path,
    change: Callable[[dict[str, torch.Tensor]], object],
    words: str,
) -> None:
    source = make_model(**SIZES)
    pack_mxfp4(source)
    edit_weights(source, change)
    with pytest.raises(CheckpointError, match=words):
        convert(source, tmp_path / "out", OPTIONS)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@torch.no_grad()
def test_an_expert_clamps_as_transformers_does() -> None:
    """Gates and ups far beyond the limit, on both sides."""
    config = GptOssConfig(hidden_size=8, intermediate_size=6, num_local_experts=1)
    stack = GptOssExperts(config)
    for parameter in stack.parameters():
        parameter.normal_(std=3.0)
    expert = Expert(GPT_OSS, 8, 6)
    for name, weight, bias in (
        ("w1", stack.gate_up_proj[0, :, 0::2], stack.gate_up_proj_bias[0, 0::2]),
        ("w3", stack.gate_up_proj[0, :, 1::2], stack.gate_up_proj_bias[0, 1::2]),
        ("w2", stack.down_proj[0], stack.down_proj_bias[0]),
    ):
        expert.get_submodule(name).load_state_dict({"weight": weight.T, "bias": bias})
    x = torch.randn(50, 8)
    both = x @ stack.gate_up_proj[0] + stack.gate_up_proj_bias[0]
    assert all((part > 7).any() and (part < -7).any() for part in (both[:, 0::2], both[:, 1::2]))
    expected = stack._apply_gate(both) @ stack.down_proj[0] + stack.down_proj_bias[0]
    torch.testing.assert_close(expert(x), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "options",
    [
        {"activation_bits": 8, "group_size": 32, "rounding": "gptq"},
        {"rounding": "gptaq", "hessian": "model", "clip_search": True, "keep_8bit": 0.2},
        {"rotate": False, "activation_bits": 8, "weight_bits": 8},
        {"rotations": "learned", "rotation_steps": 2, "activation_bits": 8, "weight_bits": 8},
        {"max_tp": 2, "activation_bits": 8, "weight_bits": 8},
    ],
    ids=["gptq", "by the model's loss", "not rotated", "learned rotations", "for two ranks"],
)
def test_it_converts_with_each_option(
    make_model: MakeModel,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    options: dict[str, Any],
) -> None:
    monkeypatch.setattr(
        smoothrot_offline.decide.stages, "load_calibration", lambda *_: TOKENS.repeat(8, 1)
    )
    # All four, as noise would send a token here and there to another expert.
    source = make_model(**SIZES, num_experts_per_tok=4, dtype=torch.float16)
    out = tmp_path / "out"
    given = {"scales": "none", "calib_samples": 4, "calib_seqlen": 20}
    convert(source, out, make_config(**given | options))
    assert verify(out).ok
    assert compare_with_source(out, source).problems == []
    with torch.no_grad():
        expected = load_model(source, torch.float32)(TOKENS).logits
        compiled, defined = (
            load_model(out, torch.float32, kernels)(TOKENS).logits
            for kernels in ("compiled", "reference")
        )
    torch.testing.assert_close(compiled, defined, rtol=1e-4, atol=1e-4)
    error = float((compiled - expected).norm() / expected.norm())
    assert error < {4: 0.3, 8: 0.05}[options.get("weight_bits", 4)]


@pytest.mark.parametrize("name", ["fast", "balanced", "best", "paper-compat"])
def test_presets_smooth_nothing_and_say_so(make_model: MakeModel, name: Any) -> None:
    checkpoint = open_checkpoint(make_model(**SIZES))
    choice = choose_preset(name, {"calib_seqlen": 32}, checkpoint)
    assert (choice.config.scales, choice.config.smooth_norms) == ("none", False)
    assert any("nothing is smoothed: experts of GptOssForCausalLM" in n for n in choice.notes)
    assert plan_conversion(checkpoint, choice.config).refusals == []


def test_scales_are_refused(make_model: MakeModel, tmp_path: Path) -> None:
    source = make_model(**SIZES)
    assert "--scales l2" in plan_conversion(open_checkpoint(source), make_config()).refusals[0]
    with pytest.raises(ConfigError, match=r"--scales l2: expected none, .*\(up \+ 1\) \* glu"):
        convert(source, tmp_path / "out", make_config())


ROPE = yarn(16, 4.0, truncate=False)["rope_parameters"]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"swiglu_alpha": 1.5}, "swiglu_alpha: expected one of 1.702.*1.5"),
        ({"swiglu_limit": 10.0}, "swiglu_limit: expected one of 7.0.*10.0"),
        ({"attention_bias": False}, "attention_bias: expected one of True.*False"),
        ({"rms_norm_eps": 1e-6}, "rms_norm_eps: expected one of 1e-05"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings: expected one of False"),
        ({"sliding_window": None}, "sliding_window: expected a whole number from 1 on"),
        (
            {"layer_types": ["full_attention", "sliding_attention", "full_attention"]},
            "layer_types of layer 0: expected sliding_attention .*got 'full_attention'",
        ),
        (
            {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
            "rope_parameters: rope_type: expected yarn .*got 'default'",
        ),
        ({"rope_parameters": ROPE | {"mscale": 2.0}}, "rope_parameters: mscale: expected none"),
        (
            {"rope_parameters": {k: v for k, v in ROPE.items() if k != "beta_fast"}},
            "rope_parameters: beta_fast: expected a number .*got None",
        ),
    ],
)
def test_what_only_one_side_computes_is_refused(
    make_model: MakeModel, changes: dict[str, Any], words: str
) -> None:
    source = make_model(**SIZES)
    edit_config(source, **changes)
    with pytest.raises(UnsupportedModelError, match=words):
        resolve(open_checkpoint(source).config)


def test_a_config_that_says_mxfp4_needs_no_packed_weights(make_model: MakeModel) -> None:
    """As with other packings, the tensors say which weights are packed."""
    source = make_model(**SIZES)
    edit_config(source, quantization_config=MXFP4_CONFIG)
    assert open_checkpoint(source).packed == {}
