# SPDX-License-Identifier: Apache-2.0
"""The whole conversion on small random models: what it writes, and how
much it holds."""

import gc
import hashlib
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from stored import load_weights
from tiny_models import byte_tokenizer
from transformers import AutoConfig, AutoModelForCausalLM

import smoothrot_offline.check.admit
import smoothrot_offline.convert
import smoothrot_offline.decide.stages
import smoothrot_offline.output.model
from smoothrot_offline.check.inspect import inspect, output_sizes
from smoothrot_offline.check.verify import verify
from smoothrot_offline.config import ConvertConfig, make_config
from smoothrot_offline.convert import convert
from smoothrot_offline.distill import distillation
from smoothrot_offline.output.manifest import read_manifest
from smoothrot_offline.rounding.rtn import quantize_rtn, store
from smoothrot_offline.source.checkpoint import open_checkpoint
from smoothrot_offline.source.layers import LayerRunner
from smoothrot_offline.source.resolve import resolve
from smoothrot_offline.source.text import load_calibration
from smoothrot_vllm.format import MANIFEST_NAME, Online, OnlineHadamard, WeightScheme, parse_schema

TOKENS = torch.arange(24).reshape(2, 12) * 7 % 96
MakeModel = Callable[..., Path]


def config(**options: object) -> ConvertConfig:
    return make_config(**{"calib_samples": 2, "calib_seqlen": 16} | options)


def digests(directory: Path) -> dict[str, str]:
    return {
        file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in directory.iterdir()
    }


def test_same_source_and_options_give_the_same_bytes(make_model: MakeModel, tmp_path: Path) -> None:
    source = make_model("qwen2", tie_word_embeddings=True)
    for name in ("a", "b"):
        convert(source, tmp_path / name, config(lm_head_bits=8, seed=5))
    convert(source, tmp_path / "c", config(lm_head_bits=8, seed=6))
    assert digests(tmp_path / "a") == digests(tmp_path / "b")
    layer = "model-00002-of-00005.safetensors"
    assert digests(tmp_path / "a")[layer] != digests(tmp_path / "c")[layer]


def test_sharded_source_gives_the_tensors_of_the_single_file(
    make_model: MakeModel, tmp_path: Path
) -> None:
    whole, sharded = make_model(), make_model(name="sharded", shard="50KB")
    assert len(list(sharded.glob("*.safetensors"))) > 2
    tensors = []
    for name, source in (("a", whole), ("b", sharded)):
        convert(source, tmp_path / name, config(scales="none"))
        tensors.append(
            {key: value.sha256 for key, value in read_manifest(tmp_path / name).tensors.items()}
        )
    assert tensors[0] == tensors[1]


def test_a_file_for_each_part_with_an_index_that_transformers_reads(
    make_model: MakeModel, tmp_path: Path
) -> None:
    source = make_model(vocab_size=4096, hidden_size=288)
    convert(source, tmp_path / "out", config(scales="none"))
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    files = sorted(file.name for file in (tmp_path / "out").glob("*.safetensors"))
    assert len(files) == 3 + 2, "the embedding, each layer, the norm with the head"
    assert files == [
        f"model-{k:05d}-of-{len(files):05d}.safetensors" for k in range(1, len(files) + 1)
    ]
    assert sorted(set(index["weight_map"].values())) == files
    stored = load_weights(tmp_path / "out")
    assert stored.keys() == index["weight_map"].keys()
    assert sum(tensor.nbytes for tensor in stored.values()) == index["metadata"]["total_size"]
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")


def test_configuration_describes_the_output(make_model: MakeModel, tmp_path: Path) -> None:
    source = make_model(tie_word_embeddings=True)
    (source / "tokenizer.json").write_text("{}")
    (source / "chat_template.jinja").write_text("{{ messages }}")
    (source / "modeling_evil.py").write_text("raise SystemExit")
    convert(
        source,
        tmp_path / "out",
        config(activation_bits=8, lm_head_bits=8, max_tp=2, group_size=-1, scales="none"),
    )
    written = json.loads((tmp_path / "out/config.json").read_text())
    schema = parse_schema(written["quantization_config"])
    assert written["tie_word_embeddings"] is False
    assert (schema.activations.bits, schema.activations.clip) == (8, 1.0)
    assert schema.lm_head is not None
    assert (
        schema.lm_head.weights.bits,
        schema.lm_head.activations.bits,
        schema.lm_head.activations.clip,
    ) == (8, 8, 1.0)
    assert schema.online.down_proj is not None
    assert (
        schema.online.down_proj.size,
        schema.online.down_proj.block,
        schema.max_tensor_parallel,
    ) == (152, 76, 2)
    assert (tmp_path / "out/tokenizer.json").read_text() == "{}"
    assert (tmp_path / "out/chat_template.jinja").exists()
    assert not (tmp_path / "out/modeling_evil.py").exists()


def test_a_four_bit_head_has_the_groups_of_the_linears(
    make_model: MakeModel, tmp_path: Path
) -> None:
    source = make_model(hidden_size=288, intermediate_size=320)
    options = config(lm_head_bits=4, group_size=32, scales="none")
    spec = resolve(json.loads((source / "config.json").read_text()))
    planned = output_sizes(spec, options, torch.bfloat16)
    convert(source, tmp_path / "out", options)
    assert verify(tmp_path / "out").ok
    assert inspect(tmp_path / "out").output_bytes == planned
    head = parse_schema(
        json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]
    ).lm_head
    assert head is not None
    assert (head.weights.bits, head.weights.group_size, head.activations.bits) == (4, 32, 8)
    stored = load_weights(tmp_path / "out")
    rows = AutoConfig.from_pretrained(source).vocab_size
    assert stored["lm_head.weight_packed"].shape == (rows, 144)
    assert stored["lm_head.weight_scale"].shape == (rows, 1)
    # Nine groups: the high nibble of the fifth byte is padding.
    assert stored["lm_head.weight_group_scale"].shape == (rows, 5)
    assert (stored["lm_head.weight_group_scale"][:, -1] < 16).all()
    # Half a byte a weight, half a byte a group and one more for the padding, a float for each row.
    assert planned.lm_head == rows * (288 // 2 + 5 + 4)


@pytest.mark.parametrize(("family", "rotate"), [("llama", False), ("gemma3", True)])
def test_conversion_without_folds_into_it_keeps_a_shared_head(
    make_model: MakeModel, tmp_path: Path, family: str, rotate: bool
) -> None:
    source = make_model(family, tie_word_embeddings=True)
    convert(source, tmp_path / "out", config(rotate=rotate, scales="none"))
    stored = load_weights(tmp_path / "out")
    original = load_file(source / "model.safetensors")
    assert "lm_head.weight" not in stored
    assert json.loads((tmp_path / "out/config.json").read_text())["tie_word_embeddings"] is True
    kept = {name for name in original if not name.endswith("_proj.weight")}
    assert {
        "model.embed_tokens.weight",
        "model.norm.weight",
        "model.layers.0.input_layernorm.weight",
    } < kept
    assert all(torch.equal(stored[name], original[name]) for name in kept)


def test_rotation_that_cannot_be_folded_is_left_to_the_server(
    make_model: MakeModel, tmp_path: Path
) -> None:
    convert(make_model("gemma3"), tmp_path / "out", config(scales="none", max_tp=2))
    schema = parse_schema(
        json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]
    )
    assert schema.online == Online(
        down_proj=OnlineHadamard(size=152, block=76), readers=OnlineHadamard(size=72, block=72)
    )
    rotations = read_manifest(tmp_path / "out").rotations
    assert rotations is not None
    assert (rotations.r1, rotations.r2, rotations.r4) == (72, 12, 76)


def test_python_code_that_transformers_has_itself_is_left_behind(
    make_model: MakeModel, tmp_path: Path
) -> None:
    source = make_model("phi3")
    path = source / "config.json"
    named = {
        "AutoConfig": "configuration_phi3.Phi3Config",
        "AutoModelForCausalLM": "modeling_phi3.Phi3ForCausalLM",
    }
    path.write_text(json.dumps(json.loads(path.read_text()) | {"auto_map": named}))
    convert(source, tmp_path / "out", config(scales="none"))
    assert "auto_map" not in json.loads((tmp_path / "out/config.json").read_text())


def test_rows_of_a_fused_linear_have_scales_of_their_own(
    make_model: MakeModel, tmp_path: Path
) -> None:
    source = make_model("phi3")
    convert(source, tmp_path / "out", config(rotate=False, scales="none"))
    stored = load_weights(tmp_path / "out")
    for linear in ("self_attn.qkv_proj", "mlp.gate_up_proj"):
        weight = load_file(source / "model.safetensors")[f"model.layers.0.{linear}.weight"]
        # q, k and v (or gate and up) quantized apart are the rows of what is stored.
        parts = [quantize_rtn(part, WeightScheme()).scale for part in weight.split(24)]
        assert torch.equal(stored[f"model.layers.0.{linear}.weight_scale"], torch.cat(parts))


def test_codes_are_those_of_the_quantizer_on_the_source(
    make_model: MakeModel, tmp_path: Path
) -> None:
    source = make_model(hidden_size=288, intermediate_size=320)
    options = config(rotate=False, scales="none", group_size=32)
    convert(source, tmp_path / "out", options)
    stored = load_weights(tmp_path / "out")
    schema = parse_schema(
        json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]
    )
    for name, weight in load_file(source / "model.safetensors").items():
        if name.endswith("_proj.weight"):
            scheme = schema.scheme(name.removesuffix(".weight"))
            assert scheme is not None
            assert scheme.weights.group_size == 32
            expected, _ = store(
                [(weight, quantize_rtn(weight, scheme.weights))],
                weight.shape,
                scheme.weights,
                name.removesuffix(".weight"),
            )
            assert len(expected) == 3
            assert all(torch.equal(stored[part], tensor) for part, tensor in expected.items())


def test_eight_bit_layers_of_a_model_in_groups_have_scales_per_channel(
    make_model: MakeModel, tmp_path: Path
) -> None:
    source = make_model(hidden_size=288, intermediate_size=320)
    convert(
        source,
        tmp_path / "out",
        config(scales="none", group_size=32, keep_8bit=0.5, calib_samples=2, calib_seqlen=16),
    )
    assert verify(tmp_path / "out").ok
    schema = parse_schema(
        json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]
    )
    kept = [name for name, scheme in schema.overrides.items() if scheme.weights.bits == 8]
    assert kept
    stored = load_weights(tmp_path / "out")
    for name in kept:
        assert schema.overrides[name].weights.group_size == -1
        assert stored[f"{name}.weight_scale"].shape[1] == 1
        assert f"{name}.weight_group_scale" not in stored


def test_float32_source_is_stored_in_bfloat16(make_model: MakeModel, tmp_path: Path) -> None:
    convert(make_model(dtype=torch.float32), tmp_path / "out", config(scales="none"))
    assert json.loads((tmp_path / "out/config.json").read_text())["dtype"] == "bfloat16"
    assert read_manifest(tmp_path / "out").tensors["model.embed_tokens.weight"].dtype == "BF16"


def test_manifest_names_source_and_choices_but_no_time_or_place(
    make_model: MakeModel, tmp_path: Path
) -> None:
    source = make_model()
    convert(source, tmp_path / "out", config(scales="max", alpha=0.6))
    manifest = read_manifest(tmp_path / "out")
    assert manifest.source.files == {
        name: hashlib.sha256((source / name).read_bytes()).hexdigest()
        for name in ("config.json", "model.safetensors")
    }
    assert manifest.calibration is not None
    assert (manifest.calibration.samples, manifest.calibration.seqlen) == (2, 16)
    assert manifest.rotations is not None
    assert (manifest.rotations.r1, manifest.rotations.r2, manifest.rotations.r4) == (72, 8, 152)
    for layer in manifest.layers:
        assert layer.smoothing is not None
        assert layer.smoothing.alpha == 0.6
        assert 0 < layer.smoothing.scale_min < layer.smoothing.scale_max
        assert len(layer.weight_error) == 7
        assert all(0.01 < error < 0.3 for error in layer.weight_error.values())
    assert str(tmp_path) not in (tmp_path / "out" / MANIFEST_NAME).read_text()


def test_calibration_file_leaves_its_digest_but_not_its_path(
    make_model: MakeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(smoothrot_offline.decide.stages, "load_calibration", lambda *_: TOKENS)
    monkeypatch.setattr(smoothrot_offline.check.admit, "check_calibration", lambda *_: None)
    text = tmp_path / "private" / "text.txt"
    text.parent.mkdir()
    text.write_text("calibration")
    source = make_model()
    byte_tokenizer().save_pretrained(source)
    convert(source, tmp_path / "out", config(calib=str(text)))
    manifest = read_manifest(tmp_path / "out")
    assert manifest.config.calib == "text.txt"
    assert manifest.calibration is not None
    assert (
        manifest.calibration.tokens_sha256
        == hashlib.sha256(TOKENS.numpy().astype("<i8").tobytes()).hexdigest()
    )


def test_no_calibration_pass_without_scales(
    make_model: MakeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        smoothrot_offline.decide.stages,
        "load_calibration",
        lambda *_: pytest.fail("calibration was loaded"),
    )
    monkeypatch.setattr(LayerRunner, "run", lambda *_: pytest.fail("a layer was run"))
    convert(make_model(), tmp_path / "out", config(scales="none"))
    assert read_manifest(tmp_path / "out").calibration is None


def test_what_no_transform_concerns_is_kept_exactly(
    make_model: MakeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = make_model("qwen3_5")
    before = load_file(source / "model.safetensors")
    kept = resolve(open_checkpoint(source).config).parameters()
    # As released checkpoints have some of them.
    before |= {name: before[name].float() * 1.001 for name in kept if name.endswith("A_log")}
    save_file(before, source / "model.safetensors", metadata={"format": "pt"})
    trained: set[str] = set()

    def distill(*arguments: Any) -> Any:
        trained.update(arguments[3])
        return distillation.distill(*arguments)

    monkeypatch.setattr(smoothrot_offline.convert, "distill", distill)
    convert(source, tmp_path / "out", config(distill_steps=2))
    # Whether the result is kept depends on its loss.
    assert "model.norm.weight" in trained
    assert trained.isdisjoint(kept)
    after = open_checkpoint(tmp_path / "out").load(kept)
    assert len(kept) == 8
    for name, tensor in after.items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, before[name].float())


def test_memory_does_not_grow_with_the_number_of_layers(
    make_model: MakeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def peak(layers: int) -> int:
        source = make_model(
            name=f"source{layers}", hidden_size=288, intermediate_size=608, num_hidden_layers=layers
        )
        most = 0

        def sampling(*arguments: object) -> object:
            nonlocal most
            time.sleep(0.02)  # by now the layer that is read ahead is there, in each of the two
            tensors = [found for found in gc.get_objects() if type(found) is torch.Tensor]
            most = max(
                most,
                sum(
                    {
                        t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
                        for t in tensors
                    }.values()
                ),
            )
            return quantize_rtn(*arguments)

        monkeypatch.setattr(smoothrot_offline.output.model, "quantize_rtn", sampling)
        gc.freeze()  # what is there already need not be looked through each time
        try:
            convert(source, tmp_path / f"out{layers}", config())
        finally:
            gc.unfreeze()
        return most

    few, many = peak(3), peak(15)
    layer_in_source = 2 * (2 * 288 * 288 + 2 * 288 * 96 + 3 * 288 * 608)
    assert many - few < layer_in_source, f"12 more layers hold {many - few} more bytes"


def test_calibration_tokens_are_asked_for_as_configured(
    make_model: MakeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def recording(*arguments: object) -> torch.Tensor:
        asked.append(arguments)
        return load_calibration(*arguments)

    monkeypatch.setattr(smoothrot_offline.decide.stages, "load_calibration", recording)
    source = make_model()
    convert(source, tmp_path / "out", config(seed=9))
    assert asked == [("generated", source, 2, 16, 9, torch.device("cpu"), 0)]
