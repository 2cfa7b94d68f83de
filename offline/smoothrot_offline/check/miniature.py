# SPDX-License-Identifier: Apache-2.0
"""A small model of a large one's very configuration: the same flags, a layer of each kind."""

from collections.abc import Mapping
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedConfig, PreTrainedModel

from smoothrot_offline.source.architecture import DENSE
from smoothrot_offline.source.experts import separate_experts
from smoothrot_offline.source.family import ModelSpec
from smoothrot_offline.source.models import make_model
from smoothrot_offline.source.parts import Experts, LatentAttention, LinearAttention
from smoothrot_offline.source.resolve import resolve

HEAD_DIM, OTHER_HEAD_DIM = 16, 32
GROUPS = 2
"""Query heads of a key-value head, and groups of experts, where the model has several."""
KV_HEADS = 2
# No two widths alike, so that one taken for the other is seen, and each with a Hadamard transform.
HIDDEN, INTERMEDIATE, SHARED, DENSE_WIDTH, VOCAB, EXPERTS, WINDOW = 80, 56, 40, 72, 48, 3, 5
SHARED_COUNT = 2
"""Experts of the width of the others that stand side by side in a shared one."""
LAYER_EMBEDDING = 12
"""Of what each layer is given of a token."""
LATENT, LATENT_QUERIES, LATENT_KEYS, LATENT_ROTARY = 20, 28, 12, 8
"""Widths of latent states, and of what is in a head beside its values."""
DELTA_KEY, DELTA_VALUE = 6, 10
"""Widths of heads of linear attention."""
_FACTORS = ("short_factor", "long_factor")


def miniature(spec: ModelSpec) -> ModelSpec:
    """The specification of the small model: every width and count is small, every other key of the
    configuration is the large one's.

    Raises:
        UnsupportedModelError: the configuration does not allow it.
    """
    config = spec.config.to_dict()
    kv_heads = min(spec.kv_heads, KV_HEADS)
    heads = kv_heads * min(spec.heads // spec.kv_heads, GROUPS)
    own_width = spec.config.is_heterogeneous or getattr(spec.config, "head_dim", None) is not None
    narrow = spec.architecture.head_dim_from_hidden or not own_width
    sizes = {
        "hidden_size": heads * HEAD_DIM if narrow else HIDDEN,
        "intermediate_size": INTERMEDIATE,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": VOCAB,
    }
    if own_width:
        sizes["head_dim"] = HEAD_DIM
    if (experts := spec.architecture.experts) is not None:
        sizes |= _small_experts(experts, spec.config)
    for table in spec.tables:
        if (keys := table.linear_attention) is not None:
            sizes |= _small_linear_attention(keys, config)
    if (latent := spec.tables[0].latent_attention) is not None:
        sizes |= _small_latent_attention(latent, config)
    if spec.layer_embedding:
        sizes |= {
            spec.architecture.layer_embedding: LAYER_EMBEDDING,
            "vocab_size_per_layer_input": VOCAB,
        }
    if config.get("sliding_window"):
        sizes["sliding_window"] = min(config["sliding_window"], WINDOW)
    by_layer = {
        key: value
        for key, value in config.items()
        if isinstance(value, list) and len(value) == spec.layers and key != "architectures"
    }
    tokens = {key: None for key in config if key.endswith("_token_id")}
    left = {
        key: value
        for key, value in config.items()
        if key not in ("auto_map", "quantization_config", "pad_token_id")
    }
    if spec.architecture.kinds:
        by_layer["kind"] = [spec.kind(index) for index in range(spec.layers)]
    chosen = _one_of_each_kind(by_layer, spec.layers)
    if spec.architecture.shared_layers:
        # Whose configuration makes the last layer one of full attention.
        chosen = sorted({*chosen, spec.layers - 1})
    layers: dict[str, Any] = {
        key: [value[index] for index in chosen] for key, value in by_layer.items()
    }
    layers.pop("kind", None)
    if experts is not None and experts.dense:
        sizes[experts.dense] = sum(spec.kind(index) == DENSE for index in chosen)
    if spec.config.is_heterogeneous:
        layers["per_layer_config"] = _small_heads(spec, chosen)
    if shared := spec.architecture.shared_layers:
        sizes[shared] = sum(spec.values_of(index) != index for index in chosen)
    rope = {"rope_parameters": _with_fewer_factors(config.get("rope_parameters"))}
    counts = {"num_hidden_layers": len(chosen)}
    small = left | sizes | tokens | layers | rope | counts
    # What a configuration class stores under another name would win.
    names = spec.config.attribute_map.items()
    small |= {stored: small[name] for name, stored in names if name in small}
    if spec.composite is None:
        return resolve(small)
    assert spec.outer is not None
    image, outer = spec.composite.image, spec.outer.to_dict()
    small |= {key: values[0] for key, values in spec.composite.text_settings.items()}
    around = {
        "text_config": small,
        "vision_config": outer["vision_config"] | _of_text(image.vision, small),
        "architectures": None,
    }
    if outer.get("audio_config"):
        around["audio_config"] = outer["audio_config"] | image.audio
    return resolve(outer | around | _of_text(image.outer, small))


def _of_text(sizes: Mapping[str, Any], text: dict[str, Any]) -> dict[str, Any]:
    """Sizes with the values of the text tower's keys that they name."""
    return {key: text[value] if isinstance(value, str) else value for key, value in sizes.items()}


def _small_experts(experts: Experts, config: PreTrainedConfig) -> dict[str, int]:
    sizes = {"intermediate_size": DENSE_WIDTH, experts.intermediate: INTERMEDIATE}
    groups, routing = 1, experts.routing
    if routing.groups:
        known, kept = getattr(config, routing.groups), getattr(config, routing.kept_groups)
        groups = min(known, GROUPS)
        sizes |= {routing.groups: groups, routing.kept_groups: groups if kept == known else 1}
    sizes |= {
        experts.count: groups * EXPERTS,
        "num_experts_per_tok": min(config.num_experts_per_tok, EXPERTS - 1),
    }
    if experts.shared is not None and experts.shared.count:
        sizes[experts.shared.count] = SHARED_COUNT
    elif experts.shared is not None:
        sizes[experts.shared.intermediate] = SHARED
    return sizes


def _small_latent_attention(keys: LatentAttention, config: dict[str, Any]) -> dict[str, int]:
    sizes = {
        keys.rank: LATENT,
        keys.keys: LATENT_KEYS,
        keys.rotary: LATENT_ROTARY,
        keys.values: HEAD_DIM,
        "head_dim": LATENT_ROTARY,  # which transformers computes RoPE by
    }
    if config[keys.query_rank] is not None:
        sizes[keys.query_rank] = LATENT_QUERIES
    return sizes


def _small_linear_attention(keys: LinearAttention, config: dict[str, Any]) -> dict[str, int]:
    key_heads = min(config[keys.key_heads], KV_HEADS)
    group = config[keys.value_heads] // config[keys.key_heads]
    return {
        keys.key_heads: key_heads,
        keys.value_heads: key_heads * min(group, GROUPS),
        keys.key_head_dim: DELTA_KEY,
        keys.value_head_dim: DELTA_VALUE,
    }


def _small_heads(spec: ModelSpec, chosen: list[int]) -> dict[int, dict[str, int]]:
    """What is said of the heads of layers whose heads are not the first layer's."""
    usual = spec.head_sizes(spec.layer_table(0))
    found = {}
    for place, index in enumerate(chosen):
        kv_heads, head_dim = spec.head_sizes(spec.layer_table(index))
        found[place] = {
            "num_key_value_heads": min(usual.kv_heads, KV_HEADS)
            if kv_heads == usual.kv_heads
            else 1,
            "head_dim": HEAD_DIM if head_dim == usual.head_dim else OTHER_HEAD_DIM,
        }
    return found


def _one_of_each_kind(by_layer: dict[str, list[Any]], layers: int) -> list[int]:
    """The first layer of each kind, and a second layer if all are alike."""
    kinds = [str([values[index] for values in by_layer.values()]) for index in range(layers)]
    chosen = sorted({kind: index for index, kind in reversed(list(enumerate(kinds)))}.values())
    return chosen if len(chosen) > 1 or layers == 1 else [0, 1]


def _with_fewer_factors(rope: Any) -> Any:
    """Rotary parameters with as many factors as the small heads have frequencies."""
    if not isinstance(rope, dict):
        return rope
    if any(isinstance(value, dict) for value in rope.values()):
        return {kind: _with_fewer_factors(value) for kind, value in rope.items()}
    frequencies = int(HEAD_DIM * rope.get("partial_rotary_factor", 1.0)) // 2
    fewer = {
        key: value[:frequencies] if key in _FACTORS and isinstance(value, list) else value
        for key, value in rope.items()
    }
    if isinstance(sections := rope.get("mrope_section"), list) and sum(sections):
        others = [section * frequencies // sum(sections) for section in sections[1:]]
        fewer["mrope_section"] = [frequencies - sum(others), *others]
    return fewer


class InFloat64(TorchFunctionMode):
    """What transformers computes in float32 whatever the model's dtype (norms, softmax, rotary
    angles, routers) is computed in float64."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Call ``func`` with float64 for float32."""
        if func is torch.Tensor.float:
            func = torch.Tensor.double
        given = {name: _wide(value) for name, value in (kwargs or {}).items()}
        return func(*map(_wide, args), **given)


def _wide(value: Any) -> Any:
    return torch.float64 if value is torch.float32 else value


def random_model(spec: ModelSpec, tied: bool) -> PreTrainedModel:
    """A float64 model of a specification, whose every number is random: norms far from one and
    biases far from zero. To be run within :class:`InFloat64`."""
    table = spec.architecture
    whole = spec.config if spec.outer is None else spec.outer
    config = type(whole).from_dict(whole.to_dict())
    config.tie_word_embeddings = tied
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        model = make_model(config, attn_implementation=table.attention, dtype=torch.float64)
        separate_experts(model.get_submodule(table.layers).children(), table, spec.config)
        for name, parameter in model.named_parameters():
            _randomize(name, parameter, table.norm_offset)
        stored = model.state_dict()
        for name, buffer in model.named_buffers():
            # What is without bounds is not clipped.
            if name in stored and buffer.isfinite().all():
                _randomize(name, buffer, norm_offset=0.0)
    return model.eval()


@torch.no_grad()
def _randomize(name: str, parameter: torch.Tensor, norm_offset: float) -> None:
    if parameter.dim() > 1:
        parameter.normal_(std=parameter.shape[-1] ** -0.5)
    elif name.endswith("correction_bias"):
        parameter.normal_(std=0.1)  # small, so that no expert is left without a token
    elif name.endswith("bias"):
        parameter.normal_(std=0.5)
    else:
        parameter.uniform_(0.5, 2.0).sub_(norm_offset)
