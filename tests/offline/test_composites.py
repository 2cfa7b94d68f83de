# SPDX-License-Identifier: Apache-2.0
"""Vision-language models: the text tower converts, what is beside it stays 16-bit, and what images
become lies in the residual stream's basis."""

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from stored import load_weights
from tiny_composites import (
    CONFIGURATIONS,
    IMAGE_TOKENS,
    composite_config,
    model_type,
    random_composite,
    save_tiny_composite,
    tokenizer_for,
)

from smoothrot_offline.check.inspect import inspect
from smoothrot_offline.check.plan import plan_conversion
from smoothrot_offline.check.proof import prove
from smoothrot_offline.check.verify import compare_with_source, verify
from smoothrot_offline.config import ConvertConfig, make_config
from smoothrot_offline.convert import convert
from smoothrot_offline.output.manifest import read_manifest
from smoothrot_offline.report.model import QuantizedLinear, load_model
from smoothrot_offline.source.checkpoint import open_checkpoint
from smoothrot_offline.source.composites import COMPOSITES
from smoothrot_offline.source.resolve import resolve, supported_table
from smoothrot_offline.transform.lora import convert_adapter
from smoothrot_offline.transform.rotation import random_rotation
from smoothrot_vllm.errors import CheckpointError, UnsupportedModelError
from smoothrot_vllm.format import parse_schema

WEIGHTS = "model.safetensors"
ROTATED = [family for family in CONFIGURATIONS if COMPOSITES[model_type(family)].writers]
# Other layouts of the same tensors: as transformers names its modules, and as former ones did.
LAYOUTS: dict[str, dict[str, str]] = {
    "gemma3": {
        "language_model.model.": "model.language_model.",
        "vision_tower.": "model.vision_tower.vision_model.",
        "multi_modal_projector.": "model.multi_modal_projector.",
    },
    "qwen2_5_vl": {"model.": "model.language_model.", "visual.": "model.visual."},
    "mistral3": {
        "language_model.model.": "model.language_model.",
        "vision_tower.": "model.vision_tower.",
        "multi_modal_projector.": "model.multi_modal_projector.",
    },
}
MISTAKES: dict[str, tuple[str, dict[str, Any], str]] = {
    "a writer left out": ("smolvlm", {"writers": ()}, "lm_head behind an image"),
    "an inner merger left out": (
        "qwen3_vl",
        {"writers": ("model.visual.merger.linear_fc2",)},
        "lm_head behind an image",
    ),
    "its first linear taken for its last": (
        "mistral3",
        {"writers": ("model.multi_modal_projector.linear_1",)},
        "lm_head behind an image",
    ),
    "a writer where nothing is": (
        "mistral3",
        {"writers": ("model.multi_modal_projector.linear_3",)},
        "lm_head behind an image",
    ),
    "a tower for sound forgotten": (
        "gemma4",
        {"kept": ("model.vision_tower", "model.embed_vision", "model.embed_audio")},
        "tensor model.audio_tower.layers.0.feed_forward1.ffw_layer_1.input_max: expected none",
    ),
    "a vision tower forgotten": (
        "idefics3",
        {"kept": ("model.connector",)},
        "tensor model.vision_model.embeddings.patch_embedding.bias: expected none",
    ),
}


def config(**options: Any) -> ConvertConfig:
    return make_config(**{"scales": "none", "seed": 3} | options)


def edit_config(directory: Path, change: Callable[[dict[str, Any]], object]) -> None:
    path = directory / "config.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def edit_weights(directory: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(directory / WEIGHTS)
    change(tensors)
    save_file(tensors, directory / WEIGHTS, metadata={"format": "pt"})


def inputs_of(family: str) -> dict[str, Any]:
    """Tokens with an image amid them, as the processors of the tiny models make them."""
    tokenizer = tokenizer_for(family)
    key = next(iter(IMAGE_TOKENS[model_type(family)]))
    token = tokenizer.convert_tokens_to_ids(IMAGE_TOKENS[model_type(family)][key])
    tokens = torch.tensor([[*range(20, 30), *[token] * 4, *range(40, 50)]])
    generator = torch.Generator().manual_seed(7)
    shape: tuple[int, ...] = (1, 3, 32, 32)
    if family in ("idefics3", "smolvlm"):
        shape = (1, 1, 3, 32, 32)
    if family.startswith("qwen"):
        shape = (16, 384)
    if model_type(family) == "gemma4":
        shape = (1, 16, 192)
    found = {"input_ids": tokens, "pixel_values": torch.randn(shape, generator=generator)}
    if family.startswith("qwen"):
        found["image_grid_thw"] = torch.tensor([[1, 4, 4]])
        found["mm_token_type_ids"] = (tokens == token).int()
    if model_type(family) == "gemma4":
        places = torch.cartesian_prod(torch.arange(4), torch.arange(4)).flip(-1)
        found["image_position_ids"] = places[None]
        found["mm_token_type_ids"] = (tokens == token).int()
    if model_type(family) == "mistral3":
        found["image_sizes"] = torch.tensor([[32, 32]])
    return found


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("family", CONFIGURATIONS)
def test_the_table_of_each_model_is_proven(family: str, tied: bool) -> None:
    found = composite_config(family).to_dict() | {"tie_word_embeddings": tied}
    # Qwen's class takes the text tower's word for it as well.
    found["text_config"] |= {"tie_word_embeddings": tied}
    spec = resolve(found)
    assert spec.tied is tied
    prove(spec)


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_wrong_table_is_refused(mistake: str, monkeypatch: pytest.MonkeyPatch) -> None:
    family, wrong, named = MISTAKES[mistake]
    monkeypatch.setitem(COMPOSITES, family, replace(COMPOSITES[family], **wrong))
    with pytest.raises(UnsupportedModelError) as refusal:
        prove(resolve(composite_config(family).to_dict()))
    assert named in str(refusal.value)


@pytest.mark.parametrize("family", CONFIGURATIONS)
def test_text_and_images_are_answered_nearly_as_by_the_source(family: str, tmp_path: Path) -> None:
    source = save_tiny_composite(tmp_path / "source", family)
    before = {name: file.read_bytes() for name, file in files(source).items()}
    options = config(weight_bits=8, activation_bits=8, rounding="gptq", scales="l2")
    calibrated = {"calib_samples": 4, "calib_seqlen": 32, "smooth_norms": True}
    out = tmp_path / "out"
    convert(source, out, options.model_copy(update=calibrated))
    assert {name: file.read_bytes() for name, file in files(out).items() if name in before} == {
        name: content for name, content in before.items() if name != "config.json"
    } | {"config.json": (out / "config.json").read_bytes()}
    assert verify(out).ok
    assert compare_with_source(out, source).problems == []
    original, converted = load_model(source, torch.float32), load_model(out, torch.float32)
    quantized = {
        name for name, module in converted.named_modules() if isinstance(module, QuantizedLinear)
    }
    spec = resolve(composite_config(family).to_dict())
    linears = {name for name, _, _ in spec.output_linears(tied=True)}
    assert quantized == linears - set(spec.unquantized())
    assert all(
        name.startswith(f"{COMPOSITES[model_type(family)].tower}.layers.") for name in quantized
    )
    seen = inputs_of(family)
    with torch.no_grad():
        for inputs in ({"input_ids": seen["input_ids"][:, :10]}, seen):
            wanted = original(**inputs).logits.log_softmax(-1)
            found = converted(**inputs).logits.log_softmax(-1)
            divergence = (wanted.exp() * (wanted - found)).sum(-1).mean()
            assert 0 < divergence < 0.02
        blind = original(**seen | {"pixel_values": seen["pixel_values"].flip(-1)}).logits
        assert (blind.log_softmax(-1) - wanted)[0, -1].abs().max() > 0.02, "images must matter"


def files(directory: Path) -> dict[str, Path]:
    return {
        file.name: file
        for file in directory.iterdir()
        if file.suffix in (".json", ".jinja") and "index" not in file.name
    }


@pytest.mark.parametrize("family", CONFIGURATIONS)
def test_what_is_beside_the_text_tower_is_stored_as_it_was(family: str, tmp_path: Path) -> None:
    source = save_tiny_composite(tmp_path / "source", family)
    convert(source, tmp_path / "out", config())
    table, spec = COMPOSITES[model_type(family)], resolve(composite_config(family).to_dict())
    original = {
        table.stored_name(name): tensor for name, tensor in load_file(source / WEIGHTS).items()
    }
    stored = load_weights(tmp_path / "out")
    changed = {name for name in spec.kept if not torch.equal(stored[name], original[name])}
    assert changed == {name for name in spec.kept if table.writes(name)}
    assert bool(changed) == (family in ROTATED)
    rotation = random_rotation(spec.hidden, 3)
    for name in changed:
        # Outputs become coordinates in the rotated stream: W^T Q, and b Q.
        weight = original[name].double()
        expected = rotation.rotate(weight.mT if weight.dim() == 2 else weight)
        expected = (expected.mT if weight.dim() == 2 else expected).to(torch.bfloat16)
        assert torch.equal(stored[name], expected), name
    written = json.loads((tmp_path / "out/config.json").read_text())
    tied = family not in ROTATED
    assert written["tie_word_embeddings"] is tied
    assert written["text_config"]["tie_word_embeddings"] is tied
    assert ("lm_head.weight" in stored) is not tied
    schema = parse_schema(written["quantization_config"])
    assert schema.ignore == spec.unquantized()
    assert schema.ignore[-len(table.kept) :] == [f"{module}." for module in table.kept]
    assert all(schema.scheme(name.removesuffix(".weight")) is None for name in spec.kept)


@pytest.mark.parametrize("family", LAYOUTS)
def test_either_layout_of_the_names_converts_to_the_same(family: str, tmp_path: Path) -> None:
    source = save_tiny_composite(tmp_path / "source", family)
    convert(source, tmp_path / "a", config())

    def rename(tensors: dict[str, torch.Tensor]) -> None:
        for name in list(tensors):
            old = next((old for old in LAYOUTS[family] if name.startswith(old)), None)
            if old is not None:
                tensors[LAYOUTS[family][old] + name.removeprefix(old)] = tensors.pop(name)

    edit_weights(source, rename)
    convert(source, tmp_path / "b", config())
    a, b = (read_manifest(tmp_path / name).tensors for name in "ab")
    assert a == b


def test_a_configuration_without_one_for_the_text_tower_converts(tmp_path: Path) -> None:
    source = save_tiny_composite(tmp_path / "source", "qwen2_5_vl")
    convert(source, tmp_path / "a", config())

    def flatten(content: dict[str, Any]) -> None:
        text = content.pop("text_config")
        rope = text.pop("rope_parameters")
        section = {"type": "mrope", "mrope_section": rope["mrope_section"]}
        kept = {key: text[key] for key in text if key not in ("model_type", "layer_types")}
        content |= kept | {"rope_scaling": section, "rope_theta": rope["rope_theta"]}
        content |= {"model_type": "qwen2_5_vl", "tie_word_embeddings": True}
        content["torch_dtype"] = content.pop("dtype", "bfloat16")

    edit_config(source, flatten)
    convert(source, tmp_path / "b", config())
    assert verify(tmp_path / "b").ok
    assert read_manifest(tmp_path / "a").tensors == read_manifest(tmp_path / "b").tensors
    models = [load_model(tmp_path / name, torch.float32) for name in "ab"]
    with torch.no_grad():
        one, other = (model(**inputs_of("qwen2_5_vl")).logits for model in models)
    assert torch.equal(one, other)


def test_plan_and_inspection_count_what_is_beside(tmp_path: Path) -> None:
    source = save_tiny_composite(tmp_path / "source", "smolvlm")
    plan = plan_conversion(open_checkpoint(source), config())
    assert plan.refusals == []
    assert plan.architecture == "SmolVLMForConditionalGeneration"
    convert(source, tmp_path / "out", config())
    found = inspect(tmp_path / "out")
    assert found.output_bytes == plan.output_bytes
    assert found.architecture == plan.architecture
    spec = resolve(composite_config("smolvlm").to_dict())
    beside = sum(torch.Size(shape).numel() for shape in spec.kept.values())
    norms = (2 * spec.layers + 1) * spec.hidden
    assert found.output_bytes.other == 2 * (beside + norms)


def test_distillation_leaves_what_is_beside(tmp_path: Path) -> None:
    source = save_tiny_composite(tmp_path / "source", "gemma3")
    options = config(activation_bits=8, distill_steps=2, calib_samples=4, calib_seqlen=32)
    convert(source, tmp_path / "out", options)
    stored, original = load_weights(tmp_path / "out"), open_checkpoint(source)
    for name in resolve(original.config).kept:
        assert torch.equal(stored[name], original.load([name])[name])


@pytest.mark.parametrize(
    ("family", "change", "words"),
    [
        (
            "gemma3",
            lambda content: content.update(logit_scale=0.5),
            "logit_scale: expected one of 1.0.*Gemma3ForConditionalGeneration.*0.5",
        ),
        ("gemma3", lambda content: content.update(is_causal=False), "is_causal: expected one of"),
        (
            "gemma3",
            lambda content: content["text_config"].update(attn_logit_softcapping=50.0),
            "attn_logit_softcapping: expected one of None.*50",
        ),
        (
            "gemma4",
            lambda content: content.update(vision_config=None),
            "vision_config: expected one, without which.*Gemma4ForConditionalGeneration",
        ),
        (
            "gemma4",
            lambda content: content["text_config"].update(pad_token_id=1),
            "pad_token_id: expected one of 0.*Gemma4ForConditionalGeneration.*1",
        ),
        (
            "mistral3",
            lambda content: content["text_config"].update(model_type="qwen3"),
            "text_config: model_type: expected one of mistral, ministral3 within"
            " Mistral3ForConditionalGeneration, got 'qwen3'",
        ),
        (
            "qwen2_5_vl",
            lambda content: content["vision_config"].update(out_hidden_size=64),
            "expected images as wide as text, 128, got 64 outputs of model.visual.merger.mlp.2",
        ),
        (
            "qwen3_vl",
            lambda content: content["vision_config"].update(num_heads=0),
            "transformers makes no qwen3_vl of it",
        ),
        (
            "smolvlm",
            lambda content: content.update(architectures=["SmolVLMModel"]),
            "expected SmolVLMForConditionalGeneration",
        ),
        (
            "smolvlm",
            lambda content: content["text_config"].update(
                rope_parameters={"rope_type": "default", "mrope_section": [4, 6, 6]}
            ),
            "mrope_section",
        ),
    ],
)
def test_what_does_not_convert_is_named(
    family: str, change: Callable[[dict[str, Any]], object], words: str
) -> None:
    found = json.loads(composite_config(family).to_json_string(use_diff=False))
    change(found)
    with pytest.raises(UnsupportedModelError) as refusal:
        resolve(found)
    assert re.search(words, str(refusal.value)), str(refusal.value)


@pytest.mark.parametrize("inner", ["qwen2_5_vl_text", "qwen3_vl_text"])
def test_a_text_tower_by_itself_is_no_model(inner: str) -> None:
    with pytest.raises(UnsupportedModelError, match="not supported"):
        supported_table({"model_type": inner, "architectures": ["Qwen2ForCausalLM"]})


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (
            lambda tensors: tensors.pop("model.connector.modality_projection.proj.weight"),
            "model.connector.modality_projection.proj.weight is missing",
        ),
        (
            lambda tensors: tensors.update({"model.vision_model.extra.weight": torch.ones(2)}),
            "model.vision_model.extra.weight.*no place in this architecture",
        ),
        (
            lambda tensors: tensors.update(
                {"model.vision_model.post_layernorm.weight": torch.ones(2)}
            ),
            "post_layernorm.weight: expected shape",
        ),
    ],
)
def test_damage_beside_the_text_tower_is_named(
    tmp_path: Path, damage: Callable[[dict[str, torch.Tensor]], object], words: str
) -> None:
    source = save_tiny_composite(tmp_path / "source", "smolvlm")
    edit_weights(source, damage)
    with pytest.raises(CheckpointError) as refusal:
        convert(source, tmp_path / "out", config())
    assert re.search(words, str(refusal.value)), str(refusal.value)


def test_adapters_are_refused(tmp_path: Path) -> None:
    convert(save_tiny_composite(tmp_path / "source", "smolvlm"), tmp_path / "out", config())
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter/adapter_config.json").write_text('{"peft_type": "LORA"}')
    with pytest.raises(UnsupportedModelError, match="SmolVLMForConditionalGeneration sees images"):
        convert_adapter(tmp_path / "adapter", tmp_path / "new", tmp_path / "out")


def test_names_of_modules_and_of_stored_tensors_are_told_apart() -> None:
    table = COMPOSITES["gemma3"]
    modules = random_composite("gemma3").state_dict()
    assert "model.vision_tower.post_layernorm.weight" in modules
    stored = {table.stored_name(name) for name in modules}
    assert "model.vision_tower.vision_model.post_layernorm.weight" in stored
    assert stored == {table.stored_name(name) for name in stored}
