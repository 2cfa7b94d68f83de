# SPDX-License-Identifier: Apache-2.0
"""Models with experts: their modules, each expert's own scales, conversions, and what is refused
by name."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from moe_models import with_separate_experts
from refusal import edit_config
from transformers import AutoModelForCausalLM, PreTrainedModel

import smoothrot_offline.decide.stages
from smoothrot_offline.check.inspect import inspect
from smoothrot_offline.check.plan import plan_conversion
from smoothrot_offline.check.verify import compare_with_source, verify
from smoothrot_offline.config import AnalysisConfig, ConvertConfig, make_config, make_schema
from smoothrot_offline.convert import convert
from smoothrot_offline.decide.smoothing import smooth_layer
from smoothrot_offline.output.manifest import read_manifest
from smoothrot_offline.presets import choose_preset
from smoothrot_offline.report.analyze import analyze
from smoothrot_offline.report.model import load_model
from smoothrot_offline.source.checkpoint import open_checkpoint
from smoothrot_offline.source.layers import LayerRunner, embed
from smoothrot_offline.source.resolve import resolve
from smoothrot_offline.transform.lora import convert_adapter
from smoothrot_offline.transform.record import read_transform
from smoothrot_vllm.errors import UnsupportedModelError

MakeModel = Callable[..., Path]
FAMILIES = {
    "mixtral": "block_sparse_moe.experts.{}.w2",
    "qwen2_moe": "mlp.experts.{}.down_proj",
    "qwen3_moe": "mlp.experts.{}.down_proj",
    # Behind a layer without experts.
    "glm4_moe": "mlp.experts.{}.down_proj",
    "deepseek_v2": "mlp.experts.{}.down_proj",
}
"""Name of an expert's down_proj by family."""
SHARED = {
    "qwen2_moe": "mlp.shared_expert.down_proj",
    "glm4_moe": "mlp.shared_experts.down_proj",
    "deepseek_v2": "mlp.shared_experts.down_proj",
}
"""That of the expert that every token goes through, where there is one."""
SPARSE = {name: {"first_k_dense_replace": 0} for name in ("glm4_moe", "deepseek_v2")}
"""What gives the first layer experts."""
TOKENS = torch.arange(40).reshape(2, 20) * 31 % 96

pytestmark = pytest.mark.filterwarnings("ignore:.*requires_grad.*:UserWarning")


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture
def calibrated(monkeypatch: pytest.MonkeyPatch) -> None:
    """Conversions are calibrated on TOKENS, or on the first of them."""
    monkeypatch.setattr(smoothrot_offline.decide.stages, "load_calibration", lambda *_: TOKENS)


def options(**changes: Any) -> dict[str, Any]:
    return {"calib_samples": 2, "calib_seqlen": 20} | changes


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("mixtral", {}),
        ("qwen2_moe", {}),
        ("qwen2_moe", {"norm_topk_prob": True}),
        ("qwen3_moe", {}),
        ("qwen3_moe", {"norm_topk_prob": True}),
        ("qwen3_next", {}),
        ("qwen3_next", {"norm_topk_prob": False}),
        ("qwen3_5_moe", {}),
        ("glm4_moe", {}),
        ("glm4_moe", {"norm_topk_prob": False, "first_k_dense_replace": 0}),
        ("glm4_moe", {"n_group": 3, "topk_group": 2, "n_shared_experts": 1}),
        ("glm4_moe", {"n_group": 1, "use_qk_norm": True}),
        ("deepseek_v2", {}),
        (
            "deepseek_v2",
            {"topk_method": "group_limited_greedy", "n_group": 3, "topk_group": 2},
        ),
        ("deepseek_v3", {}),
        ("gpt_oss", {}),
    ],
)
def test_separate_experts_compute_what_transformers_does(
    build_model: Callable[..., PreTrainedModel], name: str, changes: dict[str, Any]
) -> None:
    model = build_model(name, dtype=torch.float32, **changes)
    expected = model(TOKENS).logits
    got = with_separate_experts(model, resolve(model.config.to_dict()))(TOKENS).logits
    assert (got - expected).norm() <= 1e-6 * expected.norm()


@pytest.mark.parametrize(
    "family", [*FAMILIES, "qwen3_next", "qwen3_5_moe", "deepseek_v3", "gpt_oss"]
)
def test_a_layer_built_from_the_sources_tensors_is_transformers_layer(
    make_model: MakeModel, family: str
) -> None:
    source = make_model(family, dtype=torch.float32)
    checkpoint = open_checkpoint(source)
    spec = resolve(checkpoint.config)
    weight = checkpoint.load(["model.embed_tokens.weight"])["model.embed_tokens.weight"]
    hidden, runner = embed(TOKENS, weight), LayerRunner(spec)
    for index in range(spec.layers):
        runner.run(
            index,
            checkpoint.load_relative(spec.layer_prefix(index), spec.layer_tensors(index)),
            hidden,
            {},
        )
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).model
    model.norm = torch.nn.Identity()
    with torch.no_grad():
        torch.testing.assert_close(hidden, model(TOKENS).last_hidden_state, rtol=1e-5, atol=1e-5)


def test_scales_of_an_expert_come_from_its_own_tokens(make_model: MakeModel, family: str) -> None:
    checkpoint = open_checkpoint(make_model(family, dtype=torch.float32))
    spec, config = resolve(checkpoint.config), make_config(scales="max", rotate=False)
    index = spec.layers - 1
    layer = checkpoint.load_relative(spec.layer_prefix(index), spec.layer_tensors(index))
    hidden = embed(
        TOKENS, checkpoint.load(["model.embed_tokens.weight"])["model.embed_tokens.weight"]
    )
    seen: dict[str, torch.Tensor] = {}
    downs = [FAMILIES[family].format(e) for e in range(spec.experts)]
    downs += [SHARED[family]] if family in SHARED else []
    observers = {down: lambda x, down=down: seen.update({down: x.clone()}) for down in downs}
    LayerRunner(spec).run(index, layer, hidden.clone(), observers)
    schema = make_schema(spec, config)
    found = smooth_layer(LayerRunner(spec), config, schema, index, layer, hidden, {})
    common = len(downs) - spec.experts
    assert len(found.scales) == spec.experts * spec.intermediate + common * spec.shared
    assert sum(x.shape[0] for x in seen.values()) == TOKENS.numel() * (
        spec.config.num_experts_per_tok + common
    )
    rows = found.scales.split(spec.down_widths(index))
    for row, record, down in zip(rows, found.records, downs, strict=True):
        if down not in seen:
            assert record is None
            assert (row == 1).all()
            continue
        expected = (
            seen[down].abs().amax(0).double() / layer[f"{down}.weight"].abs().amax(0).double()
        ).sqrt()
        torch.testing.assert_close(row, expected)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.usefixtures("calibrated")
def test_a_conversion_is_whole_and_runs_as_defined(
    make_model: MakeModel, tmp_path: Path, family: str, bits: int
) -> None:
    source, out = make_model(family, num_hidden_layers=2), tmp_path / "out"
    convert(source, out, make_config(**options(activation_bits=bits, weight_bits=bits)))
    assert verify(out).ok
    compared = compare_with_source(out, source)
    spec = resolve(open_checkpoint(source).config)
    # A layer without experts has one MLP, as one of a shared expert alone would have.
    mlps = sum(spec.experts_in(index) + (family in SHARED) for index in range(2))
    attention = 3 if family == "deepseek_v2" else 4  # kv_b_proj has no codes
    assert (compared.codes, compared.problems) == (2 * attention + 3 * mlps, [])
    scales = read_transform(out).scales[1].down
    assert scales is not None
    assert scales.shape == (sum(spec.down_widths(1)),)
    assert inspect(out).quantization.ignore == spec.unquantized()
    with torch.no_grad():
        compiled, defined = (
            load_model(out, torch.float32, kernels)(TOKENS).logits
            for kernels in ("compiled", "reference")
        )
        original = load_model(source, torch.float32)(TOKENS).logits
    torch.testing.assert_close(compiled, defined, rtol=1e-4, atol=1e-4)
    if bits == 8:
        # Not less: a rounding error here and there sends a token to another expert.
        assert (defined - original).norm() < 0.3 * original.norm()


@pytest.mark.usefixtures("calibrated")
def test_gptq_rounds_each_expert_for_its_own_tokens(
    make_model: MakeModel, tmp_path: Path, family: str
) -> None:
    source = make_model(family, num_hidden_layers=1, **SPARSE.get(family, {}))
    found = {}
    for rounding in ("rtn", "gptq"):
        out = tmp_path / rounding
        convert(source, out, make_config(**options(rounding=rounding, activation_bits=8)))
        assert verify(out).ok
        assert compare_with_source(out, source).problems == []
        found[rounding] = load_model(out, torch.float32)
    original, errors = load_model(source, torch.float32), {}
    with torch.no_grad():
        # What the first layer makes of the very tokens it was rounded for, routed alike.
        expected = original.model.layers[0](
            original.model.embed_tokens(TOKENS), **_rotary(original)
        )
        rotation = read_transform(tmp_path / "rtn").transform.residual
        assert rotation is not None
        for rounding, model in found.items():
            got = model.model.layers[0](model.model.embed_tokens(TOKENS), **_rotary(model))
            errors[rounding] = float((got - rotation.rotate(expected.double()).float()).norm())
    assert errors["gptq"] < 0.8 * errors["rtn"]


def _rotary(model: PreTrainedModel) -> dict[str, Any]:
    positions = torch.arange(TOKENS.shape[1])[None]
    mask = torch.full((1, 1, TOKENS.shape[1], TOKENS.shape[1]), -torch.inf).triu(1)
    embedding = model.model.rotary_emb(torch.zeros(1, TOKENS.shape[1], 1), positions)
    return {"position_embeddings": embedding, "attention_mask": mask}


def test_experts_that_no_token_reaches_are_named_once(
    make_model: MakeModel,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(
        smoothrot_offline.decide.stages, "load_calibration", lambda *_: TOKENS[:1, :2]
    )
    with caplog.at_level(logging.WARNING, "smoothrot_offline"):
        convert(
            make_model("qwen3_moe"), tmp_path / "out", make_config(calib_samples=1, calib_seqlen=2)
        )
    (warning,) = [
        record.getMessage()
        for record in caplog.records
        if "no token was routed" in record.getMessage()
    ]
    scales = read_transform(tmp_path / "out").scales
    for index, layer in enumerate(read_manifest(tmp_path / "out").layers):
        # Two tokens reach four of the six experts at most.
        assert len(layer.unseen_experts) >= 2
        assert f"layer {index}: {', '.join(map(str, layer.unseen_experts))}" in warning
        assert [
            e for e, record in enumerate(layer.experts) if record is None
        ] == layer.unseen_experts
        found = scales[index].down
        assert found is not None
        rows = found.view(len(layer.experts), -1)
        assert [e for e, row in enumerate(rows) if (row == 1).all()] == layer.unseen_experts


@pytest.mark.parametrize(
    "changes",
    [
        {
            "scales": "search",
            "group_size": 32,
            "hidden_size": 96,
            "moe_intermediate_size": 64,
            "head_dim": 32,
        },
        {"scales": "learned"},
        {"scales": "none", "rotations": "learned", "rotation_steps": 2},
        {"scales": "quantile", "smooth_norms": True, "sign_seeds": 2, "lm_head_bits": 8},
        {"scales": "max", "rotate": False},
        {"scales": "none", "rounding": "gptq"},
        {
            "rounding": "gptaq",
            "group_size": 64,
            "hidden_size": 64,
            "moe_intermediate_size": 64,
            "head_dim": 64,
        },
        {"scales": "none", "clip_search": True},
    ],
    ids=lambda changes: "-".join(map(str, next(iter(changes.items())))),
)
def test_other_options_convert_too(
    make_model: MakeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]
) -> None:
    monkeypatch.setattr(
        smoothrot_offline.decide.stages, "load_calibration", lambda *_: TOKENS.repeat(5, 1)
    )
    sizes = {key: value for key, value in changes.items() if key not in ConvertConfig.model_fields}
    source, out = make_model("qwen3_moe", num_hidden_layers=1, **sizes), tmp_path / "out"
    convert(
        source,
        out,
        make_config(
            **options(**{key: value for key, value in changes.items() if key not in sizes})
        ),
    )
    assert verify(out).ok
    assert compare_with_source(out, source).problems == []


@pytest.mark.usefixtures("calibrated")
def test_clips_and_eight_bits_are_the_same_for_all_experts_of_a_layer(
    make_model: MakeModel, tmp_path: Path, family: str
) -> None:
    source = make_model(family, num_hidden_layers=2, **SPARSE.get(family, {}))
    out = tmp_path / "out"
    # All but the experts of one layer.
    convert(source, out, make_config(**options(clip_search=True, keep_8bit=0.8)))
    assert verify(out).ok
    assert compare_with_source(out, source).problems == []
    spec, schema = resolve(open_checkpoint(source).config), inspect(out).quantization
    groups = spec.architecture.scheme_groups()
    eight = []
    for index, layer in enumerate(read_manifest(out).layers):
        assert layer.clips.keys() == layer.sensitivity.keys() == {group[0][0] for group in groups}
        experts = {
            str(schema.scheme(spec.layer_prefix(index) + linear))
            for group in groups[-1]
            for linear in group
        }
        assert len(experts) == 1, "the server has one scheme for all of them"
        scheme = schema.scheme(spec.layer_prefix(index) + groups[-1][0][0])
        assert scheme is not None
        eight.append(scheme.weights.bits == 8)
        assert scheme.activations.clip == (1.0 if eight[-1] else layer.clips[groups[-1][0][0]])
    assert sorted(eight) == [False, True]
    with torch.no_grad():
        compiled, defined = (
            load_model(out, torch.float32, kernels)(TOKENS).logits
            for kernels in ("compiled", "reference")
        )
    torch.testing.assert_close(compiled, defined, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["fast", "balanced", "best", "paper-compat"])
def test_presets_are_those_of_dense_models(make_model: MakeModel, name: Any) -> None:
    sizes = {
        "num_hidden_layers": 1,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "hidden_size": 96,
    }
    mixture = open_checkpoint(make_model("mixtral", intermediate_size=128, **sizes))
    dense = open_checkpoint(make_model(name="dense", intermediate_size=128, **sizes))
    choice = choose_preset(name, {"calib_seqlen": 32}, mixture)
    assert choice.config == choose_preset(name, {"calib_seqlen": 32}, dense).config
    plan = plan_conversion(mixture, choice.config)
    assert plan.refusals == []
    assert plan.output_bytes is not None
    assert plan.source_bytes is not None
    assert plan.output_bytes.linears < 0.5 * plan.source_bytes.linears


def test_max_tp_divides_the_width_of_an_expert(make_model: MakeModel) -> None:
    checkpoint = open_checkpoint(make_model("qwen3_moe", intermediate_size=152))
    spec = resolve(checkpoint.config)
    assert (
        make_schema(spec, make_config(max_tp=2)).online.down_proj.block == 2
    )  # 76 / 2 = 38 = 19 * 2
    (refused,) = plan_conversion(checkpoint, make_config(max_tp=8)).refusals
    assert "76" in refused


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"mlp_only_layers": [0]},
            r"mlp_only_layers: expected \[\], experts in every layer, got \[0\]",
        ),
        (
            {"decoder_sparse_step": 2},
            r"decoder_sparse_step: expected 1, experts in every layer, got 2",
        ),
        ({"num_experts_per_tok": 7}, r"num_experts_per_tok: expected 1 to num_experts = 6 .*got 7"),
        ({"hidden_act": "gelu"}, "hidden_act: expected one of silu"),
        (
            {"model_type": "phimoe", "architectures": ["PhimoeForCausalLM"]},
            "mixture of experts.*only MixtralForCausalLM, Qwen2",
        ),
    ],
)
def test_other_mixtures_are_refused_by_name(
    make_model: MakeModel, changes: dict[str, Any], words: str
) -> None:
    source = make_model("qwen3_moe")
    edit_config(source, **changes)
    with pytest.raises(UnsupportedModelError, match=words):
        resolve(open_checkpoint(source).config)


def test_analysis_and_adapters_are_refused_by_name(make_model: MakeModel, tmp_path: Path) -> None:
    source, base = make_model("mixtral"), tmp_path / "base"
    with pytest.raises(UnsupportedModelError, match="MixtralForCausalLM has experts; analyze"):
        analyze(source, tmp_path / "analysis", AnalysisConfig())
    convert(source, base, make_config(scales="none"))
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    with pytest.raises(UnsupportedModelError, match="MixtralForCausalLM has experts; adapters"):
        convert_adapter(tmp_path / "adapter", tmp_path / "out", base)
