# SPDX-License-Identifier: Apache-2.0
"""The classes of transformed draft heads: found by vLLM, and made for the model they belong to
alone."""

from types import SimpleNamespace
from typing import Any

import pytest
from configs import make_config
from vllm.model_executor.models import ModelRegistry
from vllm.model_executor.models.qwen3_next_mtp import Qwen3NextMTP

from smoothrot_vllm.errors import ConfigError
from smoothrot_vllm.format import ADAPTER_BASE, DRAFT_ARCHITECTURE
from smoothrot_vllm.plugin import register as plugin
from smoothrot_vllm.plugin.draft import TransformedEagleHead, TransformedOwnHead
from smoothrot_vllm.plugin.patches import choose_draft_class
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


READERS = {"readers": {"size": 128, "block": 128}}


@pytest.mark.parametrize(
    ("online", "speculative", "transformed"),
    [
        ({}, {"method": "mtp", "model": "OUT"}, True),
        (READERS, {"method": "mtp", "model": "OUT"}, False),
        ({}, {"method": "mtp", "model": "ANOTHER"}, False),
        ({}, {"method": "ngram", "model": "ngram"}, False),
    ],
)
def test_a_models_own_head_has_the_linears_that_a_fold_of_r1_adds(
    online: dict[str, Any], speculative: dict[str, str], transformed: bool
) -> None:
    draft = SimpleNamespace(
        hf_config=SimpleNamespace(architectures=["Qwen3NextMTP"]),
        model_impl="vllm",
    )
    config: Any = SimpleNamespace(
        model_config=SimpleNamespace(model="OUT"),
        speculative_config=SimpleNamespace(draft_model_config=draft, **speculative),
    )
    for _ in range(2):  # as for a worker that is made once more
        choose_draft_class(config, make_config(online=online))
        (name,) = draft.hf_config.architectures
        found = ModelRegistry.models[name].load_model_cls()
        assert issubclass(found, Qwen3NextMTP)
        assert issubclass(found, TransformedOwnHead) == transformed
        assert (name == "Qwen3NextMTP") != transformed
    assert ModelRegistry.models["Qwen3NextMTP"].load_model_cls() is Qwen3NextMTP
