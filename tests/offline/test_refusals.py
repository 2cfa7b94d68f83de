# SPDX-License-Identifier: Apache-2.0
"""What cannot be converted exactly is refused, by name, before anything is written."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from refusal import WEIGHTS, edit_weights, refusal
from safetensors.torch import load_file

from smoothrot_offline.check.admit import admit
from smoothrot_offline.config import make_config
from smoothrot_offline.convert import convert
from smoothrot_offline.presets import choose_preset
from smoothrot_offline.source.checkpoint import open_checkpoint
from smoothrot_offline.source.headers import resolve_source
from smoothrot_offline.source.layers import embed
from smoothrot_offline.source.resolve import resolve
from smoothrot_vllm.errors import (
    CheckpointError,
    ConfigError,
    UnsupportedModelError,
)

MakeModel = Callable[..., Path]
UP = "model.layers.1.mlp.up_proj.weight"


def _truncate(directory: Path) -> None:
    path = directory / WEIGHTS
    path.write_bytes(path.read_bytes()[:-64])


def _header_only(directory: Path) -> None:
    (directory / WEIGHTS).write_bytes(b"\x10")


def _pickle_only(directory: Path) -> None:
    (directory / WEIGHTS).rename(directory / "pytorch_model.bin")


def _index_to_nowhere(directory: Path) -> None:
    names = load_file(directory / WEIGHTS).keys()
    (directory / WEIGHTS).unlink()
    index = {"weight_map": dict.fromkeys(names, "model-00001-of-00001.safetensors")}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


def _index_out_of_the_directory(directory: Path) -> None:
    (directory / WEIGHTS).rename(directory / "moved.safetensors")
    (directory / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {UP: "../moved.safetensors"}})
    )


def _index_names_wrong_file(directory: Path) -> None:
    names = load_file(directory / WEIGHTS).keys()
    (directory / WEIGHTS).rename(directory / "a.safetensors")
    index = {"weight_map": dict.fromkeys([*names, "model.extra.weight"], "a.safetensors")}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


def _poison(value: float) -> Callable[[Path], None]:
    def poison(directory: Path) -> None:
        edit_weights(directory, lambda tensors: tensors[UP].view(-1).__setitem__(5, value))

    return poison


def _int8_weight(directory: Path) -> None:
    edit_weights(directory, lambda tensors: tensors.update({UP: tensors[UP].to(torch.int8)}))


def _transposed(directory: Path) -> None:
    edit_weights(directory, lambda tensors: tensors.update({UP: tensors[UP].T.contiguous()}))


def _missing(directory: Path) -> None:
    edit_weights(directory, lambda tensors: tensors.pop(UP))


def _bias_without_flag(directory: Path) -> None:
    edit_weights(
        directory,
        lambda tensors: tensors.update({"model.layers.0.self_attn.o_proj.bias": torch.ones(72)}),
    )


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (_truncate, [WEIGHTS, "expected a whole safetensors file"]),
        (_header_only, [WEIGHTS, "expected a whole safetensors file"]),
        (_pickle_only, ["pytorch_model.bin", "can run code"]),
        (lambda directory: (directory / WEIGHTS).unlink(), [WEIGHTS, "neither"]),
        (_index_to_nowhere, ["model-00001-of-00001.safetensors", "the file is missing"]),
        (_index_out_of_the_directory, ["index.json", "plain file names"]),
        (_index_names_wrong_file, ["index.json", "model.extra.weight", "does not list it"]),
        (_poison(float("nan")), [WEIGHTS, UP, "1 NaN or infinite"]),
        (_poison(float("inf")), [WEIGHTS, UP, "1 NaN or infinite"]),
        (_int8_weight, [WEIGHTS, UP, "expected dtype", "I8"]),
        (_transposed, [WEIGHTS, UP, "expected shape (152, 72)", "(72, 152)"]),
        (_missing, [UP, "is missing"]),
        (_bias_without_flag, [WEIGHTS, "self_attn.o_proj.bias", "no place in this architecture"]),
        (
            lambda directory: (directory / "config.json").unlink(),
            ["config.json", "the file is missing"],
        ),
        (
            lambda directory: (directory / "config.json").write_text("{"),
            ["config.json", "cannot be read as JSON"],
        ),
        (
            lambda directory: (directory / "config.json").write_text("[]"),
            ["config.json", "expected a JSON object"],
        ),
    ],
)
def test_damaged_sources_are_refused_with_file_and_tensor(
    make_model: MakeModel, damage: Callable[[Path], None], words: list[str]
) -> None:
    source = make_model()
    damage(source)
    error = refusal(source)
    assert isinstance(error, CheckpointError)
    assert [word for word in words if word not in str(error)] == [], str(error)


def test_shared_head_that_differs_is_refused(make_model: MakeModel) -> None:
    source = make_model(tie_word_embeddings=True)
    embedding = "model.embed_tokens.weight"
    edit_weights(
        source, lambda tensors: tensors.update({"lm_head.weight": tensors[embedding].clone()})
    )
    convert(source, source.parent / "same", make_config(scales="none"))
    edit_weights(source, lambda tensors: tensors["lm_head.weight"].mul_(2))
    with pytest.raises(CheckpointError, match="tie_word_embeddings"):
        convert(source, source.parent / "out", make_config(scales="none"))


@pytest.mark.parametrize("family", ["mixtral", "qwen3_next", "qwen3_5_moe"])
def test_what_a_server_cannot_rotate_is_not_left_to_it(make_model: MakeModel, family: str) -> None:
    error = refusal(make_model(family), residual="online")
    assert isinstance(error, ConfigError)
    assert "--residual online: expected linears whose input the server can rotate" in str(error)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"group_size": 32}, ["self_attn.q_proj", "72 inputs", "--group-size"]),
        ({"group_size": 32, "weight_bits": 8}, ["--group-size 32 with --weight-bits 8", "-1"]),
        ({"max_tp": 3}, ["size 152", "got 3", "--max-tp"]),
        ({"max_tp": 8, "rotate": False}, ["self_attn.o_proj", "72 inputs over 8 shard(s)"]),
        ({"scales": "max", "calib_seqlen": 65}, ["--calib-seqlen 65", "64 tokens"]),
    ],
)
def test_options_that_do_not_fit_the_model_are_refused(
    make_model: MakeModel, options: dict[str, Any], words: list[str]
) -> None:
    message = str(refusal(make_model(), **options))
    assert [word for word in words if word not in message] == [], message


def test_norms_to_smooth_are_asked_of_families_that_have_them(make_model: MakeModel) -> None:
    error = refusal(make_model("olmo2"), smooth_norms=True)
    assert isinstance(error, ConfigError)
    assert re.search("--smooth-norms: expected norms .*Olmo2ForCausalLM", str(error))


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("damping", float("inf")),
        ("calib_samples", 2**63),
        ("weight_bits", 3),
        ("group_size", 16),
        ("alpha", 1.5),
        ("max_tp", 0),
        ("seed", -1),
        ("color", "red"),
        ("calib_seqlen", 1),
    ],
)
def test_options_out_of_range_are_named(option: str, value: object) -> None:
    with pytest.raises(ConfigError, match=f"{option}: .*{value}"):
        make_config(**{option: value})


def test_width_without_any_hadamard_block_is_refused(make_model: MakeModel) -> None:
    error = refusal(make_model(intermediate_size=151 * 2), max_tp=2)
    assert isinstance(error, UnsupportedModelError)
    assert "151" in str(error)


def test_fold_that_overflows_float16_is_refused(make_model: MakeModel) -> None:
    source = make_model(dtype=torch.float16)
    edit_weights(
        source,
        lambda tensors: (
            tensors["model.norm.weight"].fill_(60000),
            tensors["lm_head.weight"].fill_(100),
        ),
    )
    assert "lm_head.weight" in str(refusal(source))


def test_tokens_outside_the_vocabulary_are_refused() -> None:
    embedding = torch.zeros(10, 4)
    assert embed(torch.tensor([[9]]), embedding).shape == (1, 1, 4)
    for bad in (torch.tensor([[10]]), torch.tensor([[-1]]), torch.empty(0, 5, dtype=torch.int64)):
        with pytest.raises(ConfigError, match="vocabulary of 10"):
            embed(bad, embedding)


def test_activations_that_overflow_are_refused_with_the_layer(
    make_model: MakeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "smoothrot_offline.decide.stages.load_calibration", lambda *_: torch.arange(8).reshape(1, 8)
    )
    source = make_model(dtype=torch.float32)
    edit_weights(
        source,
        lambda tensors: [tensors[UP.replace("up", kind)].mul_(1e30) for kind in ("up", "down")],
    )
    assert "decoder layer 1" in str(refusal(source, scales="max", calib_seqlen=8))


@pytest.mark.parametrize("model", ["/no/such/directory", "not a model", __file__])
def test_what_is_neither_directory_nor_hub_id_is_refused(model: str) -> None:
    with pytest.raises(CheckpointError, match="expected a directory"):
        resolve_source(model)


def test_hub_failure_is_one_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "huggingface_hub.snapshot_download",
        lambda *_, **__: (_ for _ in ()).throw(OSError("offline")),
    )
    with pytest.raises(
        CheckpointError, match=r"some-org/some-model: not a local directory.*offline"
    ):
        resolve_source("some-org/some-model")


def test_supported_families_resolve_with_their_sizes(make_model: MakeModel) -> None:
    config = json.loads((make_model("qwen2", tie_word_embeddings=True) / "config.json").read_text())
    spec = resolve(config)
    assert (
        spec.layers,
        spec.hidden,
        spec.intermediate,
        spec.heads,
        spec.kv_heads,
        spec.head_dim,
    ) == (3, 72, 152, 9, 3, 8)
    assert spec.tied
    assert spec.biased() == {"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"}


@pytest.mark.parametrize(
    ("family", "name", "shape"),
    [
        ("glm4_moe", "model.layers.3.eh_proj.weight", (72, 144)),
        ("glm4_moe", "model.layers.3.mlp.experts.gate_up_proj", (6, 160, 72)),
        ("deepseek_v3", "model.layers.3.eh_proj.weight", (72, 144)),
    ],
)
def test_layers_behind_the_last_are_left_out_by_name(
    make_model: MakeModel, tmp_path: Path, family: str, name: str, shape: tuple[int, ...]
) -> None:
    source = make_model(family)
    edit_weights(source, lambda tensors: tensors.update({name: torch.ones(shape)}))
    # Nor do they keep the model from a preset.
    assert choose_preset("fast", {}, open_checkpoint(source)).config.preset == "fast"
    plain = make_config(scales="none")
    notes = admit(open_checkpoint(source), plain).notes
    assert f"not copied: 1 tensors such as {name}, of layers behind the last one" in notes[-1]
    convert(source, tmp_path / "out", plain)
    converted = open_checkpoint(tmp_path / "out").tensors
    assert not any(name.startswith("model.layers.3.") for name in converted)


def test_layers_behind_the_last_that_are_no_draft_head_are_refused(make_model: MakeModel) -> None:
    source = make_model("glm4_moe")
    name = "model.layers.4.eh_proj.weight"
    edit_weights(source, lambda tensors: tensors.update({name: torch.ones(72, 144)}))
    with pytest.raises(CheckpointError, match=name):
        admit(open_checkpoint(source), make_config(scales="none"))


def test_keys_and_values_that_no_layer_reads_are_left_out_by_name(
    make_model: MakeModel, tmp_path: Path
) -> None:
    source, name = make_model("gemma4"), "model.layers.2.self_attn.k_proj.weight"
    edit_weights(source, lambda tensors: tensors.update({name: torch.ones(36, 72)}))
    plain = make_config(scales="none")
    (note,) = admit(open_checkpoint(source), plain).notes
    assert note.startswith(f"not copied: 1 tensors such as {name}, of layers that share")
    convert(source, tmp_path / "out", plain)
    assert name not in open_checkpoint(tmp_path / "out").tensors
