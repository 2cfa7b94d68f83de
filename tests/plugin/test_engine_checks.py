# SPDX-License-Identifier: Apache-2.0
"""Settings of the engine: what is refused is all that vLLM has but what is known to work, and
the page tells of each argument."""

import dataclasses
import re
from fnmatch import fnmatch
from types import SimpleNamespace
from typing import Any, get_args

import pytest
import torch
from tiny_models import REPOSITORY
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.config.cache import CacheDType
from vllm.config.load import LoadConfig
from vllm.config.speculative import SpeculativeMethod
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.model_executor.layers.rotary_embedding import get_rope
from vllm.model_executor.model_loader import LoadFormats
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

from smoothrot_vllm.errors import ConfigError, UnsupportedModelError
from smoothrot_vllm.format import (
    DRAFT_ARCHITECTURE,
    Online,
    OnlineHadamard,
    QuantizationSchema,
)
from smoothrot_vllm.plugin.engine_checks import (
    CPU_CACHE_DTYPES,
    LOAD_FORMATS,
    OWN_HEAD,
    REFUSALS,
    TOKEN_DRAFTS,
    check_engine,
)

FOLDED = QuantizationSchema()
UNFOLDED = QuantizationSchema(online=Online(readers=OnlineHadamard(size=128, block=128)))
SECTION = (
    (REPOSITORY / "docs" / "compat.md")
    .read_text(encoding="utf-8")
    .partition("## Engine arguments")[2]
    .partition("\n## ")[0]
)
ROWS = [line.strip("|").split(" | ") for line in SECTION.splitlines() if line.startswith("| `")]


def literals(annotation: Any) -> set[str]:
    """All strings of a Literal of Literals."""
    found: set[str] = set()
    for part in get_args(annotation):
        found |= {part} if isinstance(part, str) else literals(part)
    return found


def engine(**changes: Any) -> Any:
    """The parts of vLLM's configuration that are looked at, as an engine without options has
    them."""
    parts: dict[str, Any] = {
        "model_config": SimpleNamespace(
            model="model",
            runner_type="generate",
            convert_type="none",
            enable_prompt_embeds=False,
            hf_overrides={},
            hf_config_path=None,
            quantization_config=None,
            multimodal_config=None,
            is_mm_prefix_lm=False,
            is_deepseek_mla=False,
        ),
        "load_config": LoadConfig(),
        "cache_config": SimpleNamespace(cache_dtype="auto"),
        "speculative_config": None,
        "kv_transfer_config": None,
        "weight_transfer_config": None,
    }
    return SimpleNamespace(**parts | changes)


def drafting(method: str, architecture: str, model: str = "head") -> Any:
    """As ``--speculative-config`` makes it."""
    return SimpleNamespace(
        method=method,
        model=model,
        draft_model_config=SimpleNamespace(architectures=[architecture]),
    )


def latent(rope_type: str) -> Any:
    """Of a model whose keys and values are made of latent states."""
    config = engine()
    config.model_config.is_deepseek_mla = True
    config.model_config.hf_text_config = SimpleNamespace(rope_parameters={"rope_type": rope_type})
    return config


def test_rope_that_is_computed_wrongly_on_cpus_is_refused() -> None:
    check_engine(latent("yarn"), FOLDED)
    with pytest.raises(UnsupportedModelError, match=r"rope_type: expected yarn .*, got default"):
        check_engine(latent("default"), FOLDED)


def test_what_is_refused_of_rope_is_wrong_in_vllm() -> None:
    with set_current_vllm_config(VllmConfig()):
        rope = get_rope(
            64,
            max_position=16,
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
            is_neox_style=False,
            dtype=torch.float32,
        )
    positions, queries = torch.arange(10), torch.randn(10, 4, 64)
    expected, _ = rope.forward_native(positions, queries.clone(), queries[:, :1].clone())
    found, _ = rope.forward_cpu(positions, queries.clone(), queries[:, :1].clone())
    assert (found - expected).abs().max() > 0.1


@pytest.mark.parametrize("schema", [FOLDED, UNFOLDED], ids=["folded", "online"])
def test_a_models_own_head_drafts_if_the_checkpoint_holds_it(schema: QuantizationSchema) -> None:
    own = engine(speculative_config=drafting("mtp", "Qwen3_5MTP", "model"))
    with pytest.raises(ConfigError, match=r"got mtp: it holds no head that drafts \(mtp.\*\)"):
        check_engine(own, schema)
    check_engine(own, schema.model_copy(update={"ignore": [OWN_HEAD]}))


def test_another_models_own_head_needs_the_sources_hidden_states() -> None:
    other = engine(speculative_config=drafting("mtp", "Qwen3_5MTP"))
    holding = {"ignore": [OWN_HEAD]}
    check_engine(other, UNFOLDED.model_copy(update=holding))
    with pytest.raises(ConfigError, match="got mtp: this method reads hidden states"):
        check_engine(other, FOLDED.model_copy(update=holding))


@pytest.mark.parametrize("method", sorted(literals(SpeculativeMethod)))
def test_only_drafts_from_tokens_go_with_a_rotated_residual_stream(method: str) -> None:
    config = engine(speculative_config=drafting(method, "LlamaForCausalLM"))
    check_engine(config, UNFOLDED)
    if method in TOKEN_DRAFTS:
        check_engine(config, FOLDED)
        return
    with pytest.raises(
        ConfigError, match=f"--speculative-config: .*got {method}: this method reads hidden states"
    ):
        check_engine(config, FOLDED)


def test_a_transformed_head_drafts_from_rotated_hidden_states_by_eagle() -> None:
    check_engine(engine(speculative_config=drafting("eagle", DRAFT_ARCHITECTURE)), FOLDED)
    with pytest.raises(ConfigError, match="got eagle3: this method reads"):
        check_engine(engine(speculative_config=drafting("eagle3", DRAFT_ARCHITECTURE)), FOLDED)


@pytest.mark.parametrize("load_format", sorted({*literals(LoadFormats), "a_plugins_own"}))
def test_only_formats_that_give_single_tensors_are_loaded(load_format: str) -> None:
    config = engine(load_config=LoadConfig(load_format=load_format))
    if load_format in LOAD_FORMATS:
        check_engine(config, FOLDED)
        return
    with pytest.raises(ConfigError, match=f"--load-format: .*got {load_format}: .*Leave it out"):
        check_engine(config, FOLDED)


@pytest.mark.parametrize("dtype", sorted(literals(CacheDType)))
def test_on_cpus_only_what_attention_computes_with_is_cached(dtype: str) -> None:
    assert tuple(CPUAttentionBackend.supported_kv_cache_dtypes) == CPU_CACHE_DTYPES
    config = engine(cache_config=SimpleNamespace(cache_dtype=dtype))
    if dtype in CPU_CACHE_DTYPES:
        check_engine(config, FOLDED)
        return
    with pytest.raises(ConfigError, match=f"--kv-cache-dtype: .*got {dtype}: "):
        check_engine(config, FOLDED)


def test_embedded_images_need_the_sources_residual_stream() -> None:
    config = engine()
    config.model_config.multimodal_config = SimpleNamespace(enable_mm_embeds=False)
    check_engine(config, FOLDED)
    config.model_config.multimodal_config.enable_mm_embeds = True
    check_engine(config, UNFOLDED)
    with pytest.raises(ConfigError, match=r"--enable-mm-embeds: .*rotated.*Send images"):
        check_engine(config, FOLDED)


def test_images_that_are_seen_in_both_directions_are_refused_on_cpus() -> None:
    config = engine()
    config.model_config.is_mm_prefix_lm = True
    assert not CPUAttentionBackend.supports_mm_prefix()
    with pytest.raises(ConfigError, match=r"--limit-mm-per-prompt: .*CPUs looks back alone"):
        check_engine(config, UNFOLDED)


@pytest.mark.parametrize("nested", [False, True])
def test_connectors_that_take_hidden_states_are_found_among_others(nested: bool) -> None:
    parts = [
        {"kv_connector": name} for name in ("OffloadingConnector", "ExampleHiddenStatesConnector")
    ]
    transfer = SimpleNamespace(
        kv_connector="MultiConnector", kv_connector_extra_config={"connectors": parts}
    )
    if nested:
        multi = {
            "kv_connector": "MultiConnector",
            "kv_connector_extra_config": {"connectors": parts},
        }
        transfer.kv_connector_extra_config = {"connectors": [multi]}
    with pytest.raises(
        ConfigError, match=r"--kv-transfer-config: .*got ExampleHiddenStatesConnector"
    ):
        check_engine(engine(kv_transfer_config=transfer), FOLDED)
    transfer.kv_connector_extra_config = {"connectors": parts[:1]}
    check_engine(engine(kv_transfer_config=transfer), FOLDED)


def test_an_engine_without_options_is_accepted() -> None:
    check_engine(engine(), FOLDED)


def test_the_page_tells_of_every_engine_argument_and_refusal() -> None:
    patterns = re.findall(r"`(--[a-z0-9*-]+)", " ".join(row[0] for row in ROWS))
    arguments = [
        f"--{field.name.replace('_', '-')}"
        for field in dataclasses.fields(AsyncEngineArgs)
        if field.name[0] != "_"
    ]
    assert len(arguments) > 200
    told = {
        argument
        for argument in arguments
        if any(fnmatch(argument, pattern) for pattern in patterns)
    }
    assert [argument for argument in arguments if argument not in told] == []
    assert [
        pattern
        for pattern in patterns
        if not any(fnmatch(argument, pattern) for argument in arguments)
    ] == []
    refused = " ".join(row[0] for row in ROWS if "refused" in row[1])
    assert [
        refusal.option for refusal in REFUSALS if refusal.option.split()[0] not in refused
    ] == []


def test_the_page_names_tests_that_there_are() -> None:
    sources = "".join(
        path.read_text(encoding="utf-8") for path in (REPOSITORY / "tests").rglob("test_*.py")
    )
    files = {path.name for path in (REPOSITORY / "tests").rglob("test_*.py")}
    named = re.findall(r"`(test_\w+(?:\.py)?)`", " ".join(row[-1] for row in ROWS))
    assert len(named) > 15
    assert [name for name in named if name not in files and f"def {name}(" not in sources] == []
