# SPDX-License-Identifier: Apache-2.0
"""The class of transformed draft heads: found by vLLM, and made for the model it belongs to
alone."""

from types import SimpleNamespace
from typing import Any

import pytest
from configs import make_config
from vllm.model_executor.models import ModelRegistry

from smoothrot_vllm.errors import ConfigError
from smoothrot_vllm.format import ADAPTER_BASE, DRAFT_ARCHITECTURE
from smoothrot_vllm.plugin import register as plugin
from smoothrot_vllm.plugin.draft import TransformedEagleHead
from smoothrot_vllm.plugin.quant_config import SmoothRotConfig

DIGEST, OTHER = "a" * 64, "b" * 64


def engine(head: dict[str, Any], base: SmoothRotConfig | None) -> Any:
    """The parts of vLLM's configuration that are looked at first."""
    draft = SimpleNamespace(model="HEAD", hf_config=SimpleNamespace(**head))
    return SimpleNamespace(
        speculative_config=SimpleNamespace(draft_model_config=draft), quant_config=base
    )


def test_vllm_knows_the_class_once_the_plugin_is_registered() -> None:
    plugin.register()
    assert DRAFT_ARCHITECTURE in ModelRegistry.get_supported_archs()
    assert ModelRegistry.models[DRAFT_ARCHITECTURE].load_model_cls() is TransformedEagleHead


@pytest.mark.parametrize(
    ("head", "base", "expected"),
    [
        ({ADAPTER_BASE: OTHER}, {"transform_sha256": DIGEST}, f"{DIGEST} in config.json, got b"),
        ({}, {"transform_sha256": DIGEST}, f"{DIGEST} in config.json, got None"),
        ({ADAPTER_BASE: DIGEST}, None, "of a converted model in config.json, got a"),
        ({}, None, "of a converted model in config.json, got None"),
    ],
)
def test_a_head_of_another_model_is_refused(
    head: dict[str, str], base: dict[str, str] | None, expected: str
) -> None:
    config = engine(head, None if base is None else make_config(**base))
    with pytest.raises(
        ConfigError, match=f"draft head HEAD was transformed for another model: .*{expected}"
    ):
        TransformedEagleHead(vllm_config=config)


def test_a_head_that_is_served_by_itself_is_refused() -> None:
    config: Any = SimpleNamespace(speculative_config=None, quant_config=None)
    with pytest.raises(ConfigError, match="name it in --speculative-config"):
        TransformedEagleHead(vllm_config=config)
