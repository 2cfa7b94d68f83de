# SPDX-License-Identifier: Apache-2.0
"""Run the original model one decoder layer at a time, in float32, and gather statistics of what
its linears read."""

import copy
import hashlib
from collections.abc import Callable, Mapping

import torch
from torch import nn
from transformers import AutoModel, PreTrainedModel

from smoothrot_offline.architectures import ModelSpec
from smoothrot_offline.experts import separate_experts
from smoothrot_vllm.errors import CheckpointError, ConfigError

Observer = Callable[[torch.Tensor], None]
"""Receives what a linear reads, float32 ``(tokens, in_features)``, a chunk of sequences at a
time."""

CHUNK_TOKENS = 4096
"""Tokens whose activations are held at a time while a layer runs (one sequence at least)."""

_SETTINGS_BY_LAYER = ("layer_types", "no_rope_layers")


class LayerRunner:
    """Runs single decoder layers of the original model through transformers' own code.

    Each call builds the family's base model with one layer, on the meta device, and gives that
    layer its weights: masks, sliding windows and rotary tables are then transformers' own, for any
    family, at the cost of one layer.
    """

    def __init__(self, spec: ModelSpec) -> None:
        self._spec = spec

    def run(
        self,
        index: int,
        weights: Mapping[str, torch.Tensor],
        hidden: torch.Tensor,
        observers: Mapping[str, Observer],
    ) -> None:
        """Replace ``hidden`` by the output of decoder layer ``index``, in place.

        Args:
            index: which layer.
            weights: its tensors by names relative to the layer, any float dtype.
            hidden: float32 ``(samples, seqlen, hidden)``, what the layer reads.
            observers: by linear (named relative to the layer), called with what it reads.

        Raises:
            CheckpointError: the output has a NaN or an infinity.
        """
        model, layer = self.build(index, weights)
        hooks = [
            layer.get_submodule(linear).register_forward_pre_hook(_observe(observers[linear]))
            for linear in observers
        ]
        with torch.no_grad():
            for chunk in hidden.split(max(1, CHUNK_TOKENS // hidden.shape[1])):
                chunk.copy_(model(inputs_embeds=chunk, use_cache=False).last_hidden_state)
        for hook in hooks:
            hook.remove()
        if not hidden.isfinite().all():
            raise CheckpointError(
                f"decoder layer {index}: expected finite activations in float32, got a NaN or an"
                " infinity. The weights are damaged, or the calibration text is not of this"
                " model's vocabulary."
            )

    def build(self, index: int, weights: Mapping[str, torch.Tensor]) -> tuple[nn.Module, nn.Module]:
        """A float32 model of decoder layer ``index`` alone, without embedding and final norm, and
        that layer within it, on the device of its weights.

        Called with ``inputs_embeds``, the model returns what the layer makes of them.
        """
        model = self._empty(index)
        # The rotary tables are computed, not loaded, so they must be made again outside the meta
        # device. The frequencies are computed on the CPU for every device: another's powers can
        # differ in a last bit.
        model.rotary_emb = type(model.rotary_emb)(model.config).to(
            next(iter(weights.values())).device
        )
        model.norm = nn.Identity()
        layer = model.get_submodule("layers.0")
        layer.load_state_dict(
            {name: tensor.float() for name, tensor in weights.items()}, assign=True
        )
        return model.eval(), layer

    def final_norm(self, weight: torch.Tensor) -> nn.Module:
        """The family's norm before the head, with a stored weight ``(hidden,)``, in float32."""
        norm = self._empty(0).get_submodule("norm")
        norm.load_state_dict({"weight": weight.float()}, assign=True)
        return norm

    def _empty(self, index: int) -> PreTrainedModel:
        """The base model with decoder layer ``index`` alone, on the meta device."""
        config = copy.deepcopy(self._spec.config)
        config.num_hidden_layers = 1
        for setting in _SETTINGS_BY_LAYER:
            if getattr(config, setting, None):
                setattr(config, setting, [getattr(config, setting)[index]])
        with torch.device("meta"):
            model: PreTrainedModel = AutoModel.from_config(
                config,
                attn_implementation=self._spec.architecture.attention,
                dtype=torch.float32,
                # The configuration may name code of the directory's own, in place of which this is.
                trust_remote_code=False,
            )
        separate_experts(model.get_submodule("layers"), self._spec.architecture, config)
        return model


def embed(tokens: torch.Tensor, embedding: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
    """Float32 hidden states ``(samples, seqlen, hidden)`` of int64 ``tokens (samples, seqlen)``:
    rows times ``scale``.

    They are on the device of the embedding.

    Raises:
        ConfigError: a token is outside the vocabulary.
    """
    unknown = tokens[(tokens < 0) | (tokens >= embedding.shape[0])]
    if unknown.numel() or not tokens.numel():
        got = f"token {int(unknown[0])}" if unknown.numel() else "no token"
        raise ConfigError(
            f"--calib: expected tokens of a vocabulary of {embedding.shape[0]}, got {got}. Use the"
            " tokenizer of this model."
        )
    return nn.functional.embedding(tokens.to(embedding.device), embedding).float() * scale


def tokens_digest(tokens: torch.Tensor) -> str:
    """SHA-256 of the calibration tokens as little-endian int64, in hexadecimal."""
    return hashlib.sha256(tokens.contiguous().cpu().numpy().astype("<i8").tobytes()).hexdigest()


def check_seqlen(spec: ModelSpec, seqlen: int) -> None:
    """Refuse calibration sequences longer than the model's context.

    Raises:
        ConfigError: ``seqlen`` exceeds ``max_position_embeddings``.
    """
    if seqlen > spec.config.max_position_embeddings:
        raise ConfigError(
            f"--calib-seqlen {seqlen}: expected at most the model's context of"
            f" {spec.config.max_position_embeddings} tokens."
        )


def _observe(observer: Observer) -> Callable[[nn.Module, tuple[torch.Tensor, ...]], None]:
    def hook(_module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        observer(inputs[0].flatten(0, -2))

    return hook
