# SPDX-License-Identifier: Apache-2.0
"""What the names of dimensions in a family's table stand for."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from smoothrot_offline.source.architecture import Architecture
    from smoothrot_offline.source.family import ModelSpec


def dimensions(spec: ModelSpec, table: Architecture) -> dict[str, int]:
    """Of one model, by name; ``table`` is that of a layer."""
    kv_heads, head_dim = spec.head_sizes(table)
    query, values = spec.heads * head_dim, kv_heads * head_dim
    sizes = {
        "hidden": spec.hidden,
        "two_hidden": 2 * spec.hidden,
        "intermediate": spec.intermediate,
        "query": query,
        "gated_query": 2 * query,
        "value": values,
        "query_key_value": query + 2 * values,
        "gate_up": 2 * spec.intermediate,
        "experts": spec.experts,
        "heads": spec.heads,
        "shared": spec.shared,
        "dense": spec.dense,
        "one": 1,
    }
    if width := spec.layer_embedding:
        sizes |= {
            "layer_vocab": spec.config.vocab_size_per_layer_input,
            "layer_embedding": width,
            "layer_embeddings": spec.layers * width,
        }
    if (latent := table.latent_attention) is not None:
        keys, rotary, rank = (
            getattr(spec.config, key) for key in (latent.keys, latent.rotary, latent.rank)
        )
        sizes |= {
            "latent_query": spec.heads * (keys + rotary),
            "query_rank": getattr(spec.config, latent.query_rank) or 0,
            "rank": rank,
            "rank_rotary": rank + rotary,
            "keys_values": spec.heads * (keys + head_dim),
        }
    if (delta := table.linear_attention) is not None:
        heads, width = (
            getattr(spec.config, key) for key in (delta.value_heads, delta.value_head_dim)
        )
        key_heads, key_width = (
            getattr(spec.config, key) for key in (delta.key_heads, delta.key_head_dim)
        )
        sizes |= {
            "delta_heads": heads,
            "delta_key_head": key_width,
            "delta_value_head": width,
            "delta_value": heads * width,
            "delta_query_key_value": (queries := 2 * key_heads * key_width) + heads * width,
            "delta_query_key_value_gate": queries + 2 * heads * width,
            "two_delta_heads": 2 * heads,
            "delta_kernel": getattr(spec.config, delta.kernel),
        }
    return sizes
