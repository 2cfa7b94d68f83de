# SPDX-License-Identifier: Apache-2.0
"""What a server is pointed at is checked where vLLM itself does not: a checkpoint's files, and what
an adapter is an adapter of."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from smoothrot_vllm.errors import CheckpointError, ConfigError
from smoothrot_vllm.format import ADAPTER_BASE, ADAPTER_CONFIG
from smoothrot_vllm.plugin.headers import check_adapter, check_shards


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    save_file({"a": torch.zeros(4), "b": torch.zeros(4)}, tmp_path / "model-1.safetensors")
    save_file({"c": torch.zeros(4)}, tmp_path / "model-2.safetensors")
    weight_map = {
        "a": "model-1.safetensors",
        "b": "model-1.safetensors",
        "c": "model-2.safetensors",
    }
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return tmp_path


def test_a_whole_checkpoint_passes_with_and_without_an_index(checkpoint: Path) -> None:
    check_shards(checkpoint)
    (checkpoint / "model.safetensors.index.json").unlink()
    check_shards(checkpoint)


def test_missing_tensors_are_named(checkpoint: Path) -> None:
    save_file({"other": torch.zeros(4)}, checkpoint / "model-1.safetensors")
    with pytest.raises(
        CheckpointError, match=r"model-1\.safetensors: expected tensor a and 1 more, as"
    ):
        check_shards(checkpoint)


def test_a_tensor_gone_from_file_and_index_is_named_from_the_manifest(checkpoint: Path) -> None:
    (checkpoint / "smoothrot_manifest.json").write_text(
        json.dumps({"tensors": {name: {} for name in "abcd"}})
    )
    with pytest.raises(
        CheckpointError,
        match=r"expected tensor d \(one of 1\), as smoothrot_manifest\.json lists it",
    ):
        check_shards(checkpoint)


def test_a_manifest_of_what_is_there_passes(checkpoint: Path) -> None:
    (checkpoint / "smoothrot_manifest.json").write_text(
        json.dumps({"tensors": {name: {} for name in "abc"}})
    )
    check_shards(checkpoint)


def test_a_weight_map_that_is_no_object_is_refused(checkpoint: Path) -> None:
    (checkpoint / "model.safetensors.index.json").write_text('{"weight_map": ["a"]}')
    with pytest.raises(CheckpointError, match="weight_map: expected an object, got list"):
        check_shards(checkpoint)


def test_a_missing_file_is_named(checkpoint: Path) -> None:
    (checkpoint / "model-2.safetensors").unlink()
    with pytest.raises(
        CheckpointError, match=r"model-2\.safetensors: expected a file, the file is missing"
    ):
        check_shards(checkpoint)


@pytest.mark.parametrize("keep", [0, 4, 40, -1])
@pytest.mark.parametrize("indexed", [True, False])
def test_a_truncated_file_is_named(checkpoint: Path, keep: int, indexed: bool) -> None:
    if not indexed:
        (checkpoint / "model.safetensors.index.json").unlink()
    file = checkpoint / "model-2.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(
        CheckpointError, match=r"model-2\.safetensors: expected a whole safetensors file"
    ):
        check_shards(checkpoint)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", "expected JSON"),
        ("{}", "expected a JSON object with a weight_map"),
        ("[]", "expected a JSON object, got list"),
        ('{"weight_map": ', "expected JSON"),
    ],
)
def test_an_unreadable_index_is_named(checkpoint: Path, content: str, words: str) -> None:
    (checkpoint / "model.safetensors.index.json").write_text(content)
    with pytest.raises(CheckpointError, match=rf"index\.json: {words}"):
        check_shards(checkpoint)


DIGEST, OTHER = "a" * 64, "b" * 64


def adapter(directory: Path, **config: str) -> Path:
    content = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj"], **config}
    (directory / ADAPTER_CONFIG).write_text(json.dumps(content))
    return directory


@pytest.mark.parametrize(
    ("served", "config", "message"),
    [
        (DIGEST, {}, "is of the original model: expected smoothrot_transform_sha256 aaaa"),
        (DIGEST, {ADAPTER_BASE: OTHER}, "was transformed for another conversion"),
        (None, {ADAPTER_BASE: DIGEST}, "does not say how its weights were transformed"),
    ],
)
def test_adapters_of_another_basis_are_refused(
    tmp_path: Path, served: str | None, config: dict[str, str], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        check_adapter(adapter(tmp_path, **config), served)


@pytest.mark.parametrize(
    ("text", "message"), [("{", "expected JSON"), ("[1]", "expected a JSON object, got list")]
)
def test_a_damaged_configuration_is_named(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / ADAPTER_CONFIG).write_text(text)
    with pytest.raises(ConfigError, match=f"{ADAPTER_CONFIG}: {message}"):
        check_adapter(tmp_path, DIGEST)


def test_an_adapter_without_a_configuration_is_left_to_vllm(tmp_path: Path) -> None:
    check_adapter(tmp_path / "missing", DIGEST)
