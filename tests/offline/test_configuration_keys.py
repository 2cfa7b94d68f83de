# SPDX-License-Identifier: Apache-2.0
"""A setting that only one of vLLM's and transformers' classes reads is refused unless both then
compute the same model."""

import ast
import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import transformers
from tiny_models import LATENT_SIZES
from transformers import PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from smoothrot_offline.config import make_config
from smoothrot_offline.convert import convert
from smoothrot_offline.source.composites import COMPOSITES
from smoothrot_offline.source.resolve import SUPPORTED, resolve
from smoothrot_offline.source.settings import SERVER_WIDE
from smoothrot_vllm.errors import UnsupportedModelError

YARN = LATENT_SIZES["rope_parameters"]
# Modules of vllm/model_executor/models whose classes a family is served with: its own, and those it
# is derived from.
SERVERS = {
    "llama": ["llama"],
    "mistral": ["mistral", "llama"],
    "phi3": ["phi3", "llama"],
    "qwen2": ["qwen2"],
    "qwen3": ["qwen3", "qwen2"],
    "qwen3_5_text": ["qwen3_5", "qwen3_next"],
    "qwen2_moe": ["qwen2_moe"],
    "qwen3_moe": ["qwen3_moe"],
    "qwen3_next": ["qwen3_next"],
    "qwen3_5_moe_text": ["qwen3_5", "qwen3_next"],
    "mixtral": ["mixtral"],
    "granite": ["granite"],
    "ernie4_5": ["ernie45", "llama"],
    "glm4": ["glm4"],
    "ministral3": ["mistral", "llama"],
    "exaone4": ["exaone4"],
    "olmoe": ["olmoe"],
    "glm4_moe": ["glm4_moe"],
    "deepseek_v2": ["deepseek_v2"],
    "deepseek_v3": ["deepseek_v2"],
    "gpt_oss": ["gpt_oss"],
    "gemma2": ["gemma2"],
    "gemma3_text": ["gemma3"],
    "gemma4_text": ["gemma4"],
}
# The same of vision-language models, and the packages of transformers' classes. Their text towers
# are those of the families above.
COMPOSITE_SERVERS = {
    "gemma3": (["gemma3_mm", "siglip"], ["gemma3", "siglip"]),
    "gemma4": (["gemma4_mm"], ["gemma4"]),
    "qwen2_5_vl": (["qwen2_5_vl"], ["qwen2_5_vl"]),
    "qwen3_vl": (["qwen3_vl"], ["qwen3_vl"]),
    "qwen3_5": (["qwen3_vl"], ["qwen3_5"]),
    "qwen3_5_moe": (["qwen3_vl"], ["qwen3_5_moe"]),
    "mistral3": (["mistral3", "pixtral"], ["mistral3", "pixtral"]),
    "idefics3": (["idefics3", "idefics2_vision_model"], ["idefics3"]),
    "smolvlm": (["smolvlm", "idefics3", "idefics2_vision_model"], ["smolvlm", "idefics3"]),
}
# Read, and without a say in what is computed: sizes of a draft model, names of the loader, methods
# of the configuration.
SILENT = {"target_layer_count", "ada_rms_norm_t_cond_dim", "get_text_config", "dtype", "update"}
INDEXER = {
    "index_head_dim",
    "index_n_heads",
    "index_skip_topk_offset",
    "index_topk_freq",
    "index_topk_pattern",
    "indexer_rope_interleave",
}
# vllm/model_executor/models/qwen3.py has an attention of its own, which has no qk_norm to choose.
# Those of Qwen3.5 have layers with experts too, which model_type chooses.
# That of Gemma 4 is read where rope_parameters has no kind of layers, which is refused.
# Around it are one that marks where audio ends in a prompt, and one that sizes a made-up image.
# Those of DeepSeek are read with index_topk alone, which is refused.
# That of gpt-oss finds there what its own checkpoints of quantized experts are.
HARMLESS = {
    "deepseek_v2": INDEXER,
    "deepseek_v3": INDEXER,
    "gpt_oss": {"quantization_config"},
    "gemma4_text": {"rope_local_base_freq"},
    "gemma4": {"eoa_token_id", "num_channels"},
    "qwen3": {"qk_norm"},
    "qwen3_5_text": {
        "decoder_sparse_step",
        "mlp_only_layers",
        "moe_intermediate_size",
        "norm_topk_prob",
        "num_experts",
        "num_experts_per_tok",
        "shared_expert_intermediate_size",
    },
}
# Which vLLM serves with transformers' own class.
SERVED_BY_TRANSFORMERS = {"smollm3", "seed_oss", "hunyuan_v1_dense", "glm", "olmo2", "olmo3"}
STRAY: list[tuple[str, str, Any]] = [
    ("llama", "bias", True),
    ("llama", "qkv_bias", True),
    ("llama", "logit_scale", 0.5),
    ("llama", "is_causal", False),
    ("llama", "sliding_window", 8),
    ("qwen3_moe", "shared_expert_intermediate_size", 16),
    ("llama", "layer_types", ["sliding_attention", "full_attention", "full_attention"]),
    ("mistral", "attention_bias", True),
    ("mistral", "mlp_bias", True),
    ("mistral", "qkv_bias", True),
    ("mistral", "llama_4_scaling", {"beta": 0.1, "original_max_position_embeddings": 8}),
    ("mistral", "ada_rms_norm_t_cond", True),
    ("phi3", "attention_bias", True),
    ("phi3", "bias", True),
    ("phi3", "mlp_bias", True),
    ("qwen2", "head_dim", 16),
    ("qwen2", "qk_norm", True),
    ("qwen2", "dual_chunk_attention_config", {"chunk_size": 8}),
    ("qwen2_moe", "head_dim", 16),
    ("qwen2_moe", "dual_chunk_attention_config", {"chunk_size": 8}),
    ("qwen3", "attention_bias", True),
    ("qwen3", "dual_chunk_attention_config", {"chunk_size": 8}),
    ("qwen3_moe", "dual_chunk_attention_config", {"chunk_size": 8}),
    ("qwen3_5", "attention_bias", True),
    ("qwen3_5", "qkv_bias", True),
    ("qwen3_5", "attn_output_gate", False),
    ("qwen3_5", "output_gate_type", "sigmoid"),
    ("qwen3_5", "layer_scale", True),
    ("qwen3_5", "dual_chunk_attention_config", {"chunk_size": 8}),
    ("qwen3_5_moe", "norm_topk_prob", False),
    ("qwen3_5_moe", "mlp_only_layers", [1]),
    ("qwen3_5_moe", "decoder_sparse_step", 2),
    ("qwen3_5_moe", "attention_bias", True),
    ("qwen3_next", "attention_bias", True),
    ("qwen3_next", "mlp_only_layers", [1]),
    ("qwen3_next", "tie_word_embeddings", True),
    ("qwen3_next", "qkv_bias", True),
    ("granite", "bias", True),
    ("granite", "logit_scale", 0.5),
    ("granite", "attention_sinks", True),
    ("granite", "layer_rope_theta", [10000.0, 0, 10000.0]),
    ("granite", "layer_types", ["full_attention"] * 3),
    ("granite", "sliding_window", 8),
    ("seed_oss", "logit_scale", 0.5),
    ("seed_oss", "sliding_window", 8),
    ("hunyuan_v1_dense", "final_logit_softcapping", 30.0),
    ("smollm3", "attn_logit_softcapping", 30.0),
    ("glm", "sliding_window", 8),
    ("glm4", "num_nextn_predict_layers", 1),
    ("glm4", "sliding_window", 8),
    ("glm4_moe", "sliding_window", 8),
    ("glm4_moe", "tie_word_embeddings", True),
    ("glm4_moe", "layer_types", ["full_attention"] * 3),
    ("glm4_moe", "hidden_act", "gelu"),
    ("glm4_moe", "first_k_dense_replace", 3),
    ("glm4_moe", "n_shared_experts", 0),
    ("glm4_moe", "n_group", 4),
    ("glm4_moe", "n_group", 6),
    ("glm4_moe", "topk_group", 3),
    ("glm4_moe", "num_experts_per_tok", 4),
    ("glm4_moe", "per_layer_config", {"1": {"head_dim": 20}}),
    ("deepseek_v2", "attention_bias", True),
    ("deepseek_v2", "mlp_bias", True),
    ("deepseek_v2", "norm_topk_prob", True),
    ("deepseek_v2", "scoring_func", "sigmoid"),
    ("deepseek_v2", "topk_method", "noaux_tc"),
    ("deepseek_v2", "n_group", 2),
    ("deepseek_v2", "n_group", None),
    ("deepseek_v2", "num_key_value_heads", 3),
    ("deepseek_v2", "rms_norm_eps", 1e-5),
    ("deepseek_v2", "moe_layer_freq", 2),
    ("deepseek_v2", "tie_word_embeddings", True),
    ("deepseek_v2", "rope_parameters", {**YARN, "mscale": None}),
    ("deepseek_v2", "rope_parameters", {**YARN, "attention_factor": 1.0}),
    ("deepseek_v2", "rope_parameters", {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}),
    ("deepseek_v3", "topk_method", "greedy"),
    ("deepseek_v3", "scoring_func", "softmax"),
    ("deepseek_v3", "rope_interleave", False),
    ("deepseek_v3", "head_dim", 12),
    ("deepseek_v3", "kv_lora_rank", 0),
    ("deepseek_v3", "q_lora_rank", 0),
    ("deepseek_v3", "index_topk", 4),
    ("deepseek_v3", "sliding_window", 8),
    ("ernie4_5", "use_bias", True),
    ("ernie4_5", "attention_bias", True),
    ("ernie4_5", "mlp_bias", True),
    ("ernie4_5", "qkv_bias", True),
    ("ernie4_5", "bias", True),
    ("ernie4_5", "sliding_window", 8),
    ("ministral3", "llama_4_scaling", {"beta": 0.1, "original_max_position_embeddings": 8}),
    ("ministral3", "attention_bias", True),
    ("olmo2", "sliding_window", 8),
    ("olmo3", "logit_scale", 0.5),
    ("olmoe", "attention_bias", True),
    ("olmoe", "clip_qkv", 8.0),
    ("olmoe", "norm_topk_prob", True),
    ("olmoe", "rms_norm_eps", 1e-6),
    ("olmoe", "tie_word_embeddings", True),
    ("olmoe", "head_dim", 16),
    ("exaone4", "attention_bias", True),
    ("exaone4", "bias", True),
    ("exaone4", "mlp_bias", True),
    ("exaone4", "logit_scale", 0.5),
    ("exaone4", "sliding_window", None),
    ("exaone4", "layer_types", ["full_attention"] * 3),
    ("gemma3", "is_causal", False),
    ("gemma4", "attn_logit_softcapping", 30.0),
    ("gemma4", "use_bidirectional_attention", "all"),
    ("gemma4", "use_double_wide_mlp", True),
    ("gemma4", "num_kv_shared_layers", 4),
    ("gemma4", "num_kv_shared_layers", 5),
    ("gemma4", "vocab_size_per_layer_input", 95),
    ("gemma4", "num_experts", 4),
    ("gemma4", "enable_moe_block", True),
    ("gemma4", "per_layer_config", {"1": {"intermediate_size": 76}}),
    ("gemma4", "per_layer_config", {"1": {"head_dim": 20}}),
    ("gemma4", "rope_parameters", {"rope_type": "default", "rope_theta": 10000.0}),
]


def read_keys(source: str) -> set[str]:
    """Keys that a module reads from a configuration: ``config.key`` and ``getattr(config, "key",
    …)``."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute) and _is_config(node.value):
            found.add(node.attr)
        if (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Name)
            and node.func.id in ("getattr", "hasattr")
        ):
            target, key = node.args[:2]
            if _is_config(target) and isinstance(key, ast.Constant):
                found.add(str(key.value))
    return found


def _is_config(node: ast.expr) -> bool:
    name = (
        node.id
        if isinstance(node, ast.Name)
        else node.attr
        if isinstance(node, ast.Attribute)
        else ""
    )
    return name in ("config", "hf_config")


def server_keys(modules: list[str]) -> set[str]:
    """Keys that modules of vLLM's models read."""
    spec = importlib.util.find_spec("vllm")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    models = Path(spec.submodule_search_locations[0]) / "model_executor" / "models"
    found = (read_keys((models / f"{module}.py").read_text()) for module in modules)
    return set().union(*found) - SILENT


def reference_keys(model_type: str) -> set[str]:
    """What transformers' class for a family reads, or has as a setting."""
    kind = CONFIG_MAPPING[model_type]
    package = Path(str(transformers.__file__)).parent / "models" / kind.__module__.split(".")[-2]
    modeling = read_keys((package / f"modeling_{package.name}.py").read_text())
    return modeling | {
        key
        for key in kind().to_dict()
        if key in (package / f"configuration_{package.name}.py").read_text()
    }


@pytest.mark.parametrize("model_type", SERVERS)
def test_each_key_that_only_the_server_reads_has_a_rule(model_type: str) -> None:
    table = SUPPORTED[model_type]
    ruled = {*table.settings, *table.same, *SERVER_WIDE}
    ruled |= {"head_dim"} if table.head_dim_from_hidden else set()
    ruled |= {"llama_4_scaling"} if table.scaled_queries else set()
    # Refused where transformers has no kinds of layers.
    ruled |= set() if table.layer_types else {"layer_types"}
    unruled = (
        server_keys(SERVERS[model_type])
        - reference_keys(model_type)
        - ruled
        - HARMLESS.get(model_type, set())
    )
    assert unruled == set()


@pytest.mark.parametrize("model_type", COMPOSITE_SERVERS)
def test_each_key_around_a_text_tower_that_the_server_reads_has_a_rule(
    model_type: str,
) -> None:
    modules, packages = COMPOSITE_SERVERS[model_type]
    folder = Path(str(transformers.__file__)).parent / "models"
    sources = {
        kind: [
            file.read_text() for package in packages for file in (folder / package).glob(f"{kind}*")
        ]
        for kind in ("modeling_", "configuration_")
    }
    read = set().union(*map(read_keys, sources["modeling_"]))
    found = server_keys(modules)
    assert found & read
    named = {key for key in found if any(key in text for text in sources["configuration_"])}
    unruled = found - read - named - HARMLESS.get(model_type, set())
    assert unruled == set(COMPOSITES[model_type].settings)


def test_what_the_rules_are_held_against_is_read_at_all() -> None:
    assert {"qkv_bias", "bias", "mlp_bias", "logit_scale"} <= server_keys(SERVERS["llama"])
    assert {"attention_bias", "mlp_bias", "rope_parameters"} <= reference_keys("llama")
    assert "qkv_bias" not in reference_keys("llama")


def test_every_family_is_compared_or_served_by_transformers_own_class() -> None:
    assert set(SUPPORTED) - set(SERVERS) == SERVED_BY_TRANSFORMERS


@pytest.mark.parametrize("model_type", sorted(SERVED_BY_TRANSFORMERS))
def test_each_key_that_vllm_gives_meaning_to_for_any_class_has_a_rule(model_type: str) -> None:
    table = SUPPORTED[model_type]
    assert {"logit_scale", "final_logit_softcapping", "attn_logit_softcapping"} < set(
        table.settings
    )
    assert table.layer_types or "sliding_window" in table.settings


def test_every_vision_language_model_is_compared() -> None:
    assert set(COMPOSITES) == set(COMPOSITE_SERVERS)


@pytest.mark.parametrize(("family", "key", "value"), STRAY)
def test_stray_key_is_refused_by_its_name(
    build_model: Callable[..., PreTrainedModel], family: str, key: str, value: object
) -> None:
    config = build_model(family).config.to_dict() | {"architectures": None}
    resolve(config)
    with pytest.raises(UnsupportedModelError, match=rf"\b{key}\b"):
        resolve(config | {key: value})


@pytest.mark.parametrize(
    ("changes", "served"),
    [
        ({"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 0}, True),
        ({"use_sliding_window": False, "sliding_window": 5, "max_window_layers": 1}, True),
        ({"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}, False),
        # transformers then has a window in no layer, the server in all.
        ({"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 3}, False),
    ],
)
def test_qwen2_converts_with_a_window_in_all_layers_or_in_none(
    build_model: Callable[..., PreTrainedModel], changes: dict[str, Any], served: bool
) -> None:
    config = (
        build_model("qwen2").config.to_dict()
        | {"architectures": None, "layer_types": None}
        | changes
    )
    if served:
        resolve(config)
        return
    with pytest.raises(UnsupportedModelError, match="use_sliding_window, max_window_layers"):
        resolve(config)


@pytest.mark.parametrize(
    "rope", [{"partial_rotary_factor": 0.5}, {"mrope_section": [1, 1, 2]}, {"use_fope": True}]
)
def test_rotary_settings_that_transformers_does_not_compute_are_refused(
    build_model: Callable[..., PreTrainedModel], rope: dict[str, Any]
) -> None:
    config = build_model("llama").config.to_dict() | {"architectures": None}
    with pytest.raises(UnsupportedModelError, match=next(iter(rope))):
        resolve(config | {"rope_parameters": config["rope_parameters"] | rope})


def test_what_the_server_reads_by_another_key_is_written_for_it(
    make_model: Callable[..., Path], tmp_path: Path
) -> None:
    source = make_model("ministral3")
    assert "llama_4_scaling" not in json.loads((source / "config.json").read_text())
    convert(source, tmp_path / "out", make_config(scales="none"))
    written = json.loads((tmp_path / "out/config.json").read_text())
    rope = written["rope_parameters"]
    context = "original_max_position_embeddings"
    assert written["llama_4_scaling"] == {"beta": 0.5, context: rope[context]}
    resolve({key: value for key, value in written.items() if key != "quantization_config"})


def test_what_transformers_always_computes_is_written_for_the_server(
    make_model: Callable[..., Path], tmp_path: Path
) -> None:
    source = make_model("deepseek_v3")
    convert(source, tmp_path / "out", make_config(scales="none"))
    written = json.loads((tmp_path / "out/config.json").read_text())
    assert (written["topk_method"], written["scoring_func"]) == ("noaux_tc", "sigmoid")


def test_a_width_of_heads_that_the_server_has_no_default_for_is_written(
    make_model: Callable[..., Path], tmp_path: Path
) -> None:
    source = make_model("glm4_moe", head_dim=8)
    config = json.loads((source / "config.json").read_text())
    assert config.pop("head_dim") == config["hidden_size"] // config["num_attention_heads"]
    (source / "config.json").write_text(json.dumps(config))
    convert(source, tmp_path / "out", make_config(scales="none"))
    assert json.loads((tmp_path / "out/config.json").read_text())["head_dim"] == 8


@pytest.mark.parametrize(
    ("missing", "rope"),
    [
        ("llama_4_scaling_beta", {}),
        ("original_max_position_embeddings", {"llama_4_scaling_beta": 0.1}),
    ],
)
def test_what_queries_grow_by_must_be_numbers(
    build_model: Callable[..., PreTrainedModel], missing: str, rope: dict[str, Any]
) -> None:
    config = build_model("ministral3").config.to_dict() | {"architectures": None}
    plain = {"rope_type": "default", "rope_theta": 10000.0}
    with pytest.raises(UnsupportedModelError, match=f"{missing}: expected a number"):
        resolve(config | {"rope_parameters": plain | rope})


def test_flags_that_change_nothing_are_let_pass(
    build_model: Callable[..., PreTrainedModel],
) -> None:
    neutral = {
        "bias": False,
        "qkv_bias": False,
        "logit_scale": 1,
        "is_causal": True,
        "num_experts": 1,
        "quantization_config": None,
    }
    assert (
        resolve(build_model("llama").config.to_dict() | {"architectures": None} | neutral).layers
        == 3
    )
