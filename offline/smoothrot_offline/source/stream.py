# SPDX-License-Identifier: Apache-2.0
"""What goes from layer to layer beside the residual stream where layers run one by one: what each
is given of a token, and keys and values that later layers share."""

from typing import Any, NamedTuple

import torch
from torch import nn

from smoothrot_offline.source.family import ModelSpec


class Output(NamedTuple):
    """In the form of transformers' models."""

    last_hidden_state: torch.Tensor


class LayerInStream(nn.Module):
    """A base model with one decoder layer that reads and gives out the whole stream, ``(samples,
    seqlen, spec.stream)``: the residual stream, what each layer is given of a token, then keys and
    values of each of ``spec.shared_sources``.

    Args:
        model: transformers' base model with decoder layer ``index`` alone.
        spec: of the whole model.
        index: which layer.
    """

    def __init__(self, model: Any, spec: ModelSpec, index: int) -> None:
        super().__init__()
        # It would project embeddings, which what a later layer reads is not.
        model.project_per_layer_inputs = lambda _, given: given
        self._model = (model,)  # a tuple, so that its layers have no second name here
        self.layers = model.layers
        self._kind = spec.config.layer_types[index]
        self._given = slice(index * spec.layer_embedding, (index + 1) * spec.layer_embedding)
        self._widths, self._head_dim = [spec.hidden, spec.layers * spec.layer_embedding], 0
        self._place: int | None = None
        source = spec.values_of(index)
        for number, shared in enumerate(spec.shared_sources):
            kv_heads, head_dim = spec.head_sizes(spec.layer_table(shared))
            self._widths += [2 * kv_heads * head_dim]
            if shared == source:
                self._place, self._head_dim = number, head_dim
        self.is_source = self._place is not None and source == index
        """Whether later layers share this one's keys and values."""

    def forward(self, inputs_embeds: torch.Tensor, use_cache: bool) -> Output:
        """What the layer makes of the stream."""
        hidden, given, *shared = inputs_embeds.split(self._widths, dim=-1)
        states: dict[str, tuple[torch.Tensor, ...]] = {}
        if self._place is not None and not self.is_source:
            heads = shared[self._place].unflatten(-1, (2, -1, self._head_dim))
            states[self._kind] = heads.permute(2, 0, 3, 1, 4).unbind()
        own = given[..., self._given].unsqueeze(-2)
        (model,) = self._model
        found = model(
            inputs_embeds=hidden,
            per_layer_inputs=own if own.numel() else None,
            shared_kv_states=states,
            use_cache=use_cache,
        ).last_hidden_state
        if self.is_source and self._kind in states:
            stacked = torch.stack(states[self._kind]).permute(1, 3, 0, 2, 4)
            shared[self._place] = stacked.flatten(2)
        return Output(torch.cat([found, given, *shared], dim=-1))

    def after_attention(self, middle: torch.Tensor) -> torch.Tensor:
        """What the layer makes of the stream as it is behind attention."""
        (layer,) = self.layers
        attention, layer.self_attn = layer.self_attn, _NoAttention()
        try:
            found: torch.Tensor = self(middle, use_cache=False).last_hidden_state
        finally:
            layer.self_attn = attention
        return found


class _NoAttention(nn.Module):
    """Adds nothing to the residual stream, and a norm behind it leaves nothing."""

    def forward(self, hidden_states: torch.Tensor, **_: Any) -> tuple[torch.Tensor, None]:
        return torch.zeros_like(hidden_states), None
