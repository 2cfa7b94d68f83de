# SPDX-License-Identifier: Apache-2.0
"""Only adapters that were transformed for the served checkpoint get as far as vLLM's own loader."""

import json
from pathlib import Path

import pytest
from vllm.lora.peft_helper import PEFTHelper

from smoothrot_vllm.errors import ConfigError
from smoothrot_vllm.plugin.adapters import BASE_KEY, CONFIG_NAME, AdapterGuard, check_adapter

DIGEST, OTHER = "a" * 64, "b" * 64


def adapter(directory: Path, **config: str) -> Path:
    content = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj"], **config}
    (directory / CONFIG_NAME).write_text(json.dumps(content))
    return directory


@pytest.mark.parametrize(
    ("served", "config", "message"),
    [
        (DIGEST, {}, "is of the original model: expected smoothrot_transform_sha256 aaaa"),
        (DIGEST, {BASE_KEY: OTHER}, "was transformed for another conversion"),
        (None, {BASE_KEY: DIGEST}, "does not say how its weights were transformed"),
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
    (tmp_path / CONFIG_NAME).write_text(text)
    with pytest.raises(ConfigError, match=f"{CONFIG_NAME}: {message}"):
        check_adapter(tmp_path, DIGEST)


def test_the_guard_stands_before_vllms_reader(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        PEFTHelper, "from_local_dir", PEFTHelper.from_local_dir
    )  # put back after the test
    guard = AdapterGuard()
    guard.install(OTHER)
    guard.install(DIGEST)
    with pytest.raises(ConfigError, match="of the original model"):
        PEFTHelper.from_local_dir(str(adapter(tmp_path)), 128)
    helper = PEFTHelper.from_local_dir(str(adapter(tmp_path, **{BASE_KEY: DIGEST})), 128)
    assert (helper.r, helper.vllm_max_position_embeddings) == (4, 128)
