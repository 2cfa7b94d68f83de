# SPDX-License-Identifier: Apache-2.0
"""GPTQ, AWQ and compressed-tensors weights are worth what their codes say, and convert as the
model of those weights."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from packers import (
    Pack,
    awq,
    awq_config,
    compressed,
    compressed_config,
    compressed_fp8,
    compressed_fp8_config,
    fp8,
    fp8_config,
    gptq,
    gptq_config,
    pack_linears,
)
from refusal import edit_config, edit_weights
from safetensors.torch import load_file

from smoothrot_offline.check.admit import admit
from smoothrot_offline.check.plan import plan_conversion
from smoothrot_offline.check.verify import compare_with_source, verify
from smoothrot_offline.config import make_config
from smoothrot_offline.convert import convert
from smoothrot_offline.presets import choose_preset
from smoothrot_offline.report.model import load_model
from smoothrot_offline.source.checkpoint import open_checkpoint
from smoothrot_vllm.errors import (
    CheckpointError,
    ConfigError,
    SmoothRotError,
    UnsupportedModelError,
)

MakeModel = Callable[..., Path]
OPTIONS = make_config(scales="none")
UP = "model.layers.1.mlp.up_proj"
LINEARS = re.compile(r"_proj\.|\.mlp\.gate\.")
CODES = {"group_size": 8, "symmetric": False}
PACKED: dict[str, tuple[dict[str, Any], Pack]] = {
    "gptq": (gptq_config(group_size=8), gptq(group_size=8, symmetric=True)),
    "gptq, asymmetric": (gptq_config(group_size=8, sym=False), gptq(**CODES)),
    "gptq, a last group cut off": (
        gptq_config(group_size=16, sym=False),
        gptq(group_size=16, symmetric=False),
    ),
    "gptq, by channel": (gptq_config(sym=False), gptq(group_size=-1, symmetric=False)),
    "gptq, 8 bits": (gptq_config(8, group_size=8, sym=False), gptq(8, **CODES)),
    "gptq, ordered": (
        gptq_config(group_size=8, sym=False, desc_act=True),
        gptq(ordered=True, **CODES),
    ),
    "gptq_v2": (
        gptq_config(version=2, group_size=8, sym=False),
        gptq(version=2, lowest_zero=0, **CODES),
    ),
    "gptq_v2, 8 bits, ordered": (
        gptq_config(8, version=2, group_size=8, sym=False, desc_act=True),
        gptq(8, version=2, lowest_zero=0, ordered=True, **CODES),
    ),
    "awq": (awq_config(8), awq(8)),
    "awq, by channel": (awq_config(-1), awq(-1)),
    "compressed": (compressed_config(4, 8, True), compressed(4, 8, True)),
    "compressed, asymmetric": (compressed_config(4, 8, False), compressed(4, 8, False)),
    "compressed, by channel": (compressed_config(4, -1, True), compressed(4, -1, True)),
    "compressed, 8 bits": (compressed_config(8, -1, True), compressed(8, -1, True)),
    "compressed, 8 bits, asymmetric": (compressed_config(8, 8, False), compressed(8, 8, False)),
    "compressed, ordered": (
        compressed_config(4, 8, False, ordered=True),
        compressed(4, 8, False, ordered=True),
    ),
    "fp8": (fp8_config(), fp8()),
    "fp8, as transformers has it": (
        fp8_config(weight_block_size=None),
        fp8("weight_scale_inv", ()),
    ),
    "compressed fp8": (compressed_fp8_config("tensor"), compressed_fp8("tensor")),
    "compressed fp8, by channel": (compressed_fp8_config("channel"), compressed_fp8("channel")),
    "compressed fp8, weights alone": (
        compressed_fp8_config("channel", input_activations=None),
        compressed_fp8("channel"),
    ),
    "compressed fp8, by block": (compressed_fp8_config("block"), compressed_fp8("block")),
}


def packed(make_model: MakeModel, kind: str, **options: Any) -> tuple[Path, dict[str, Any]]:
    source = make_model(**options)
    return source, pack_linears(source, *PACKED[kind])


@pytest.mark.parametrize("kind", PACKED)
def test_weights_are_worth_what_their_codes_say(make_model: MakeModel, kind: str) -> None:
    source, worth = packed(make_model, kind)
    assert len(worth) == 21
    checkpoint = open_checkpoint(source)
    loaded = checkpoint.load(worth)
    for name, expected in worth.items():
        assert expected.count_nonzero() > expected.numel() / 2
        assert torch.equal(loaded[name], expected)
    assert "quantization_config" not in checkpoint.config


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("gptq, ordered", {}),
        ("awq", {"shard": "20KB"}),
        (
            "compressed, asymmetric",
            {"family": "qwen3_moe", "head_dim": 8, "moe_intermediate_size": 80},
        ),
        ("compressed fp8, by channel", {}),
    ],
)
def test_converts_as_the_model_of_the_same_weights(
    make_model: MakeModel, tmp_path: Path, kind: str, options: dict[str, Any]
) -> None:
    source, worth = packed(make_model, kind, **options)
    (source / "quantize_config.json").write_text("{}")
    plain = make_model(name="plain", **options | {"shard": "1GB"})
    edit_weights(plain, lambda tensors: tensors.update(worth))
    found = plan_conversion(open_checkpoint(source), OPTIONS)
    assert found.refusals == []
    assert f"{len(worth)} weights are read from " in " ".join(found.notes)
    assert found.source_bytes is not None
    stored = {
        name: part
        for file in source.glob("*.safetensors")
        for name, part in load_file(file).items()
    }
    linears = [part.nbytes for name, part in stored.items() if LINEARS.search(name)]
    assert found.source_bytes.linears == sum(linears)
    assert admit(open_checkpoint(source), OPTIONS).notes == found.notes
    convert(source, tmp_path / "out", OPTIONS)
    convert(plain, tmp_path / "expected", OPTIONS)
    assert verify(tmp_path / "out").ok
    assert not (tmp_path / "out/quantize_config.json").exists()
    assert compare_with_source(tmp_path / "out", source).problems == []
    files = sorted((tmp_path / "expected").glob("*.safetensors"))
    assert len(files) == 5
    for file in files:
        assert (tmp_path / "out" / file.name).read_bytes() == file.read_bytes()


@torch.no_grad()
@pytest.mark.parametrize(
    "kind",
    [
        "compressed",
        "compressed, asymmetric",
        "compressed, ordered",
        "compressed fp8, weights alone",
    ],
)
def test_transformers_runs_compressed_weights_as_they_are_read(
    make_model: MakeModel, kind: str
) -> None:
    source, worth = packed(make_model, kind)
    plain = make_model(name="plain")
    edit_weights(plain, lambda tensors: tensors.update(worth))
    tokens = torch.arange(12)[None]
    logits = [load_model(path, torch.float32)(tokens).logits for path in (source, plain)]
    assert torch.equal(*logits)


Change = Callable[[Path], None]


def weights(change: Callable[[dict[str, torch.Tensor]], object]) -> Change:
    return lambda source: edit_weights(source, change)


def says(quantization: dict[str, Any]) -> Change:
    return lambda source: edit_config(source, quantization_config=quantization)


def put(part: str, tensor: torch.Tensor) -> Change:
    return weights(lambda tensors: tensors.update({f"{UP}.{part}": tensor}))


def scheme(**changes: Any) -> dict[str, Any]:
    """A compressed-tensors configuration whose only group has changes."""
    found = compressed_config(4, 8, True)
    group = found["config_groups"]["group_0"]
    return found | {"config_groups": {"group_0": group | changes}}


def of_weights(**changes: Any) -> dict[str, Any]:
    return scheme(
        weights=compressed_config(4, 8, True)["config_groups"]["group_0"]["weights"] | changes
    )


def first_to(value: int, part: str) -> Change:
    return weights(lambda tensors: tensors[f"{UP}.{part}"].view(-1)[:1].fill_(value))


TWO_SCHEMES = compressed_config(4, 8, True)
TWO_SCHEMES["config_groups"]["group_1"] = compressed_config(8, 8, True)["config_groups"]["group_0"]
REFUSED: dict[str, tuple[str, Change, type[SmoothRotError], str]] = {
    "no scales": (
        "gptq",
        weights(lambda t: t.pop(f"{UP}.scales")),
        CheckpointError,
        r"up_proj\.scales: expected BF16 or F16 or F32 \(9, 152\) .* 4-bit GPTQ weights, got none",
    ),
    "scales of another shape": (
        "awq",
        put("scales", torch.ones(8, 152)),
        CheckpointError,
        r"got F32 \(8, 152\)",
    ),
    "zero points of another dtype": (
        "compressed, asymmetric",
        put("weight_zero_point", torch.zeros(19, 9)),
        CheckpointError,
        r"expected I32 \(19, 9\).*got F32",
    ),
    "codes in one dimension": (
        "gptq",
        put("qweight", torch.zeros(9, dtype=torch.int32)),
        CheckpointError,
        r"two dimensions, got \(9,\)",
    ),
    "codes of another width": (
        "compressed",
        put("weight_packed", torch.zeros(152, 8, dtype=torch.int32)),
        CheckpointError,
        r"weight_scale: expected .* \(152, 8\)",
    ),
    "unpacked too": (
        "awq",
        put("weight", torch.ones(152, 72)),
        CheckpointError,
        "expected the weight once, got model.layers.1.mlp.up_proj.qweight",
    ),
    "part of no weight": (
        "compressed",
        put("weight_zero_point", torch.zeros(19, 9, dtype=torch.int32)),
        CheckpointError,
        "weight_zero_point .* no place",
    ),
    "NaN scale": (
        "gptq",
        weights(lambda t: t[f"{UP}.scales"][2].fill_(torch.nan)),
        CheckpointError,
        "up_proj.scales: expected finite values, got 152 NaN",
    ),
    "weight beyond float32": (
        "awq",
        weights(lambda t: t.update({f"{UP}.scales": torch.full((9, 152), 3e38)})),
        CheckpointError,
        "up_proj.weight: expected finite values",
    ),
    "group too high": (
        "gptq",
        first_to(9, "g_idx"),
        CheckpointError,
        "g_idx: expected groups from 0 to 8, got 9",
    ),
    "group below 0": ("compressed, ordered", first_to(-1, "weight_g_idx"), CheckpointError, "-1"),
    "groups of different sizes": (
        "compressed, ordered",
        weights(lambda t: t[f"{UP}.weight_g_idx"].copy_(torch.arange(72) // 16)),
        CheckpointError,
        "weight_g_idx: expected 8 inputs in each of 9 groups, got 16",
    ),
    "ordered without groups": (
        "gptq, ordered",
        weights(lambda t: t.pop(f"{UP}.g_idx")),
        CheckpointError,
        "g_idx: expected I32 .* got none",
    ),
    "zero points of gptq_v2 called gptq": (
        "gptq_v2",
        says(gptq_config(group_size=8, sym=False)),
        CheckpointError,
        r"qzeros: expected zero points below 15.* got \d+ of 15",
    ),
    "symmetric with other zero points": (
        "gptq, asymmetric",
        says(gptq_config(group_size=8)),
        CheckpointError,
        "qzeros: expected zero points of 7",
    ),
    "symmetric, gptq called gptq_v2": (
        "gptq",
        says(gptq_config(version=2, group_size=8)),
        CheckpointError,
        "qzeros: expected zero points of 8, .* got 7",
    ),
    "another shape said": (
        "compressed",
        put("weight_shape", torch.tensor([152, 71])),
        CheckpointError,
        r"weight_shape: expected \[152, 72\], .* got \[152, 71\]",
    ),
    "gptq of 3 bits": ("gptq", says(gptq_config(3)), UnsupportedModelError, "bits: .* got 3"),
    "gptq for Marlin": (
        "gptq",
        says(gptq_config(checkpoint_format="marlin")),
        UnsupportedModelError,
        "checkpoint_format: expected gptq or gptq_v2, got 'marlin'",
    ),
    "gptq in an old form for Marlin": (
        "gptq",
        says(gptq_config(is_marlin_format=True)),
        UnsupportedModelError,
        "is_marlin_format",
    ),
    "gptq of several bits": (
        "gptq",
        says(gptq_config(dynamic={"+:.*down_proj": {"bits": 8}})),
        UnsupportedModelError,
        "dynamic: expected the same bits",
    ),
    "gptq that is not said to be symmetric or not": (
        "gptq",
        says(gptq_config(sym="yes")),
        UnsupportedModelError,
        "sym: expected true or false, got 'yes'",
    ),
    "group size 0": ("gptq", says(gptq_config(group_size=0)), UnsupportedModelError, "group_size"),
    "awq for GEMV": (
        "awq",
        says(awq_config(8, version="gemv")),
        UnsupportedModelError,
        "version: expected gemm, got 'gemv'",
    ),
    "awq without zero points": (
        "awq",
        says(awq_config(8, zero_point=False)),
        UnsupportedModelError,
        "zero_point",
    ),
    "awq of 8 bits": ("awq", says(awq_config(8, bits=8)), UnsupportedModelError, "of 4 bits"),
    "quantized activations": (
        "compressed",
        says(scheme(input_activations={"num_bits": 8, "dynamic": True})),
        UnsupportedModelError,
        "input_activations: expected none in pack-quantized",
    ),
    "activations with stored scales": (
        "compressed fp8",
        says(compressed_fp8_config("tensor", input_activations={"num_bits": 8, "dynamic": False})),
        UnsupportedModelError,
        "group_0.input_activations: expected none, or dynamic",
    ),
    "quantized outputs": (
        "compressed fp8",
        says(compressed_fp8_config("tensor", output_activations={"num_bits": 8})),
        UnsupportedModelError,
        "group_0.output_activations",
    ),
    "fp8 activations with stored scales": (
        "fp8",
        says(fp8_config(activation_scheme="static")),
        UnsupportedModelError,
        "activation_scheme: expected dynamic.* got 'static'",
    ),
    "scales of a cache": (
        "fp8",
        weights(lambda t: t.update({"model.layers.0.self_attn.k_scale": torch.ones(1)})),
        UnsupportedModelError,
        "self_attn.k_scale: expected scales of weights alone, got one of cached keys",
    ),
    "scales of parts of a weight": (
        "fp8",
        put("weight_scale", torch.ones(3)),
        CheckpointError,
        r"weight_scale: expected .* \(1,\) .* got F32 \(3,\)",
    ),
    "fp8 without a scale": (
        "compressed fp8, by channel",
        weights(lambda t: t.pop(f"{UP}.weight_scale")),
        CheckpointError,
        "up_proj.weight_scale.* got none",
    ),
    "fp8 in blocks without a size": (
        "compressed fp8, by block",
        says(
            compressed_fp8_config(
                "block", weights={"num_bits": 8, "type": "float", "strategy": "block"}
            )
        ),
        UnsupportedModelError,
        "block_structure: expected two positive numbers",
    ),
    "a quantized cache": (
        "compressed",
        says(compressed_config(4, 8, True, kv_cache_scheme={"num_bits": 8})),
        UnsupportedModelError,
        "kv_cache_scheme",
    ),
    "transforms": (
        "compressed",
        says(compressed_config(4, 8, True, transform_config={"config_groups": {"u": {}}})),
        UnsupportedModelError,
        "transform_config",
    ),
    "sparse weights": (
        "compressed",
        says(compressed_config(4, 8, True, sparsity_config={"format": "sparse-24-bitmask"})),
        UnsupportedModelError,
        "sparsity_config",
    ),
    "another format": (
        "compressed",
        says(compressed_config(4, 8, True, format="nvfp4-pack-quantized")),
        UnsupportedModelError,
        "format: expected pack-quantized or float-quantized, got 'nvfp4-pack-quantized'",
    ),
    "no groups": (
        "compressed",
        says(compressed_config(4, 8, True, config_groups={})),
        UnsupportedModelError,
        "at least one group",
    ),
    "two schemes": (
        "compressed",
        says(TWO_SCHEMES),
        UnsupportedModelError,
        "one scheme in all groups",
    ),
    "floats packed": (
        "compressed",
        says(of_weights(type="float")),
        UnsupportedModelError,
        "weights.type: expected .* got 'float'",
    ),
    "one scale for a weight": (
        "compressed",
        says(of_weights(strategy="tensor")),
        UnsupportedModelError,
        "weights.strategy",
    ),
    "another method": (
        "gptq",
        says({"quant_method": "hqq"}),
        UnsupportedModelError,
        "quant_method 'hqq'.*read are fp8, gptq, awq, compressed-tensors",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_by_name(make_model: MakeModel, tmp_path: Path, case: str) -> None:
    kind, change, error, words = REFUSED[case]
    source, _ = packed(make_model, kind)
    change(source)
    with pytest.raises(error, match=words):
        convert(source, tmp_path / "out", OPTIONS)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_rules_that_leave_modules_out_are_no_obstacle(make_model: MakeModel) -> None:
    source, worth = packed(make_model, "gptq")
    says(gptq_config(group_size=8, dynamic={"-:.*lm_head": {}}))(source)
    assert torch.equal(open_checkpoint(source).load(worth)[f"{UP}.weight"], worth[f"{UP}.weight"])


def test_what_runs_the_original_as_a_whole_is_refused(
    make_model: MakeModel, tmp_path: Path
) -> None:
    source, _ = packed(make_model, "awq")
    out, checkpoint = tmp_path / "out", open_checkpoint(source)
    with pytest.raises(ConfigError, match=r"--distill-steps 3: .* got 4-bit AWQ ones such as"):
        convert(source, out, make_config(scales="none", distill_steps=3))
    with pytest.raises(ConfigError, match=r"--calib generated: .* got 4-bit AWQ weights"):
        convert(source, out, make_config(calib_seqlen=16))
    assert not out.exists()
    choice = choose_preset("best", {}, checkpoint)
    assert choice.config.distill_steps == 0
    assert any("as a whole with 4-bit AWQ weights" in note for note in choice.notes)
