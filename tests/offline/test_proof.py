# SPDX-License-Identifier: Apache-2.0
"""A family's table is proven for a configuration before use: right ones pass, wrong ones are
refused by name."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from family_models import MODELS
from transformers import PreTrainedModel

from smoothrot_offline.check.miniature import EXPERTS, GROUPS, VOCAB, miniature
from smoothrot_offline.check.proof import prove
from smoothrot_offline.config import make_config
from smoothrot_offline.convert import convert
from smoothrot_offline.source.parts import Multipliers
from smoothrot_offline.source.resolve import SUPPORTED, resolve
from smoothrot_vllm.errors import UnsupportedModelError

LLAMA, GEMMA3, QWEN2, QWEN2_MOE, QWEN3, PHI3, GLM4_MOE = (
    SUPPORTED[name]
    for name in ("llama", "gemma3_text", "qwen2", "qwen2_moe", "qwen3", "phi3", "glm4_moe")
)
LEAST: dict[str, Any] = {"scales": "none", "rounding": "rtn"}
MISTAKES: dict[str, tuple[str, dict[str, Any], str]] = {
    "a reader left out": (
        "llama",
        {"readers": LLAMA.readers | {"input_layernorm": ("self_attn.q_proj", "self_attn.v_proj")}},
        "layers.0.self_attn.k_proj",
    ),
    "a writer left out": ("llama", {"writers": ("mlp.down_proj",)}, "layers.0.mlp.gate_proj"),
    "the other writer left out": (
        "llama",
        {"writers": ("self_attn.o_proj",)},
        "layers.1.self_attn.q_proj",
    ),
    "readers of another norm": (
        "llama",
        {"readers": dict(zip(LLAMA.readers, reversed(LLAMA.readers.values()), strict=True))},
        "layers.0.self_attn.q_proj",
    ),
    "keys taken for values": ("llama", {"value": "self_attn.k_proj"}, "layers.0.self_attn.o_proj"),
    "gate taken for up": (
        "llama",
        {"up": "mlp.gate_proj"},
        "layers.0.mlp.down_proj",
    ),
    "post-norms forgotten": ("gemma3", {"post_norms": ()}, "tensor model.layers.0.post_"),
    "a post-norm taken for a pre-norm": (
        "gemma3",
        {
            "readers": {
                "input_layernorm": GEMMA3.readers["input_layernorm"],
                "post_attention_layernorm": GEMMA3.readers["pre_feedforward_layernorm"],
            },
            "post_norms": ("pre_feedforward_layernorm", "post_feedforward_layernorm"),
        },
        "layers.0.mlp.gate_proj",
    ),
    "the norm's offset forgotten": ("gemma3", {"norm_offset": 0.0}, "layers.0.self_attn.q_proj"),
    "the embedding's scale forgotten": ("gemma3", {"scaled_embedding": False}, "embed_tokens"),
    "the embedding's multiplier forgotten": (
        "granite",
        {"multipliers": Multipliers(residual="residual_multiplier", logits="logits_scaling")},
        "embed_tokens",
    ),
    "the logits' divisor forgotten": (
        "granite",
        {
            "multipliers": Multipliers(
                embedding="embedding_multiplier", residual="residual_multiplier"
            )
        },
        "logits",
    ),
    "biases forgotten": ("qwen2", {"biases": {}}, "tensor model.layers.0.self_attn.k_proj.bias"),
    "keys taken for values, where heads have two widths": (
        "gemma4",
        {"value": "self_attn.k_proj"},
        "layers.0.self_attn.o_proj",
    ),
    "the factor of layers forgotten": (
        "gemma4",
        {"parameters": {}},
        "tensor model.layers.0.layer_scalar",
    ),
    "head norms forgotten": ("qwen3", {"head_norms": ()}, "self_attn.k_norm.weight"),
    "a shared expert's writer left out": (
        "qwen2_moe",
        {"writers": ("self_attn.o_proj", "mlp.experts.{e}.down_proj")},
        "layers.1.self_attn.q_proj",
    ),
    "a shared expert's gate left out": (
        "qwen2_moe",
        {
            "readers": QWEN2_MOE.readers
            | {
                "post_attention_layernorm": QWEN2_MOE.readers["post_attention_layernorm"][:-1],
            }
        },
        "layers.0.mlp.shared_expert_gate",
    ),
    "a writer of layers without experts left out": (
        "glm4_moe",
        {
            "kinds": GLM4_MOE.kinds
            | {"dense": replace(GLM4_MOE.kinds["dense"], writers=("self_attn.o_proj",))}
        },
        "layers.1.self_attn.q_proj",
    ),
    "layers without experts forgotten": (
        "glm4_moe",
        {"kinds": dict.fromkeys(GLM4_MOE.kinds, GLM4_MOE.kinds["sparse"])},
        "tensor model.layers.0.mlp.down_proj.weight",
    ),
    "the correction of a router's choice forgotten": (
        "glm4_moe",
        {"kinds": GLM4_MOE.kinds | {"sparse": replace(GLM4_MOE.kinds["sparse"], parameters={})}},
        "tensor model.layers.1.mlp.gate.e_score_correction_bias",
    ),
    "values not last": ("phi3", {"value": "mlp.gate_up_proj"}, "layers.0.self_attn.o_proj"),
}


@pytest.mark.parametrize("name", MODELS)
def test_the_table_of_each_family_is_proven(
    name: str, build_model: Callable[..., PreTrainedModel]
) -> None:
    spec = resolve(build_model(**MODELS[name]).config.to_dict())
    state = torch.get_rng_state()
    prove(spec)
    assert torch.get_rng_state().equal(state)


@pytest.mark.parametrize("name", MODELS)
def test_the_model_of_a_proof_is_small(
    name: str, build_model: Callable[..., PreTrainedModel]
) -> None:
    large = resolve(build_model(**MODELS[name]).config.to_dict())
    small = miniature(large)
    assert small.experts <= GROUPS * EXPERTS
    assert small.vocab == VOCAB
    assert small.architecture.model_type == large.architecture.model_type


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_wrong_table_is_refused_before_anything_is_written(
    mistake: str, make_model: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    family, wrong, named = MISTAKES[mistake]
    source = make_model(family)
    table = SUPPORTED[model_type := f"{family}_text" if family.startswith("gemma") else family]
    monkeypatch.setitem(SUPPORTED, model_type, replace(table, **wrong))
    with pytest.raises(UnsupportedModelError) as refusal:
        convert(source, tmp_path / "out", make_config(**LEAST))
    assert named in str(refusal.value)
    assert not (tmp_path / "out").exists()
