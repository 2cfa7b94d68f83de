# SPDX-License-Identifier: Apache-2.0
"""EAGLE heads, and a model's own, for a converted model with R1 folded: they read and draft its
hidden states.

vLLM hands such a head what the final norm gives out, the base's embedding, and the base's output
head, and takes what it gives out for the next hidden state. With gamma the weight that the final
norm had, the converted model's hidden states are ``(x / gamma) Q``, its embedding ``e Q``, and its
output head ``W diag(gamma) Q``. So the columns of ``fc`` that read the embedding are multiplied by
Q, those that read hidden states by ``diag(gamma) Q``, and all within the head stays as it was. What
it gives out has to become ``(x / gamma) Q`` too. That cannot be folded into its last layer, whose
norm reads the same sum, so it is a linear more, which the plugin's model class has.

A model's own head (multi-token prediction) reads both through norms. That of the embedding, whose
length no rotation changes, is folded into ``fc`` like any other. That of hidden states divides by
the length of gamma x, which ``(x / gamma) Q`` does not have, so they are first taken back to what
the original's are, by one linear more.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from smoothrot_offline.source.family import ModelSpec
from smoothrot_offline.transform.companions import (
    cast_back,
    check_floats,
    read_base,
    read_untransformed,
    read_weights,
    refuse_value,
    write_companion,
)
from smoothrot_offline.transform.record import RecordedTransform
from smoothrot_offline.transform.sides import ModelTransform
from smoothrot_vllm.errors import CheckpointError, ConfigError, UnsupportedModelError
from smoothrot_vllm.format import DRAFT_ARCHITECTURE, DRAFT_INPUT, DRAFT_OUTPUT

CONFIG_NAME, WEIGHTS_NAME = "config.json", "model.safetensors"
FUSION, EMBEDDING = "fc.weight", "embed_tokens.weight"
EMBEDDING_NORM = "pre_fc_norm_embedding.weight"
_UNCHANGED = re.compile(r"layers\.\d+\..+")
_ONLINE = "Convert the base with --residual online, which serves the head as it is."


@dataclass(frozen=True)
class HeadConversion:
    """What a finished conversion of a draft head did: how many layers it has, and whether an
    embedding of its own."""

    layers: int
    embedding: bool
    base: str

    def summary(self) -> dict[str, Any]:
        """The facts in one JSON-able object."""
        return {
            "layers": self.layers,
            "own_embedding": self.embedding,
            "base_transform_sha256": self.base,
        }


def convert_head(head: Path, out: Path, base: Path) -> HeadConversion:
    """Transform an EAGLE head of the original model into one of the converted model.

    Args:
        head: directory with ``config.json`` and ``model.safetensors``, as vLLM's
            ``EagleLlamaForCausalLM`` reads them.
        out: directory to make, complete or not at all; tensors keep their dtypes.
        base: the converted model that will be served.

    Raises:
        ConfigError: the head is no EAGLE head of a Llama, is of another size, has been transformed
            already, the base has the source's hidden states, or ``out`` is taken.
        CheckpointError: a file is missing or damaged, a tensor has the wrong shape or is not
            finite, or the final norm removed a channel.
        UnsupportedModelError: the head has a tensor that vLLM's class has no place for, or the base
            sees images.
    """
    recorded = read_base(base, "draft head", _ONLINE)
    spec = recorded.transform.spec
    if recorded.transform.residual is None:
        raise ConfigError(
            f"{base}: its hidden states are those of the original model, expected a base with R1"
            " folded. Serve the head as it is."
        )
    config = _llama_config(head / CONFIG_NAME, spec)
    tensors = read_weights(head / WEIGHTS_NAME, "draft head")
    _check(tensors, spec)
    changed = {
        name: cast_back(tensor, tensors.get(name, tensors[FUSION]).dtype, name)
        for name, tensor in transform_head(
            recorded,
            tensors[FUSION].double(),
            tensors[EMBEDDING].double() if EMBEDDING in tensors else None,
        ).items()
    }
    digest = write_companion(
        out,
        base,
        (CONFIG_NAME, config | {"architectures": [DRAFT_ARCHITECTURE]}),
        (WEIGHTS_NAME, tensors | changed),
    )
    layers = {name.split(".")[1] for name in tensors if _UNCHANGED.fullmatch(name)}
    return HeadConversion(len(layers), EMBEDDING in tensors, digest)


def transform_head(
    recorded: RecordedTransform, fusion: torch.Tensor, embedding: torch.Tensor | None
) -> dict[str, torch.Tensor]:
    """The tensors of a head that its transform changes or adds.

    Args:
        recorded: the base's transform.
        fusion: float64 ``(hidden, 2 hidden)``, reads an embedding and a hidden state.
        embedding: the head's own, float64 ``(vocab, hidden)``; None if it shares the base's.

    Raises:
        CheckpointError: the final norm removed a channel, which the head could not give back.
    """
    transform = recorded.transform
    gamma = recorded.norms[transform.spec.architecture.final_norm].double()
    refuse_removed_channels(transform.spec, gamma, _ONLINE)
    embedded, hidden = fusion.chunk(2, dim=1)
    changed = {
        FUSION: torch.cat([transform.embedding(embedded), transform.head(hidden, gamma)], dim=1),
        f"{DRAFT_OUTPUT}.weight": transform.hidden(torch.eye(len(gamma)).double(), gamma).T,
    }
    if embedding is not None:
        changed[EMBEDDING] = transform.embedding(embedding)
    return changed


def transform_own_head(
    transform: ModelTransform, gamma: torch.Tensor, head: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """The tensors of a model's own head that its transform changes or adds, by names after its
    module.

    Args:
        transform: the model's.
        gamma: the weight that its final norm had, float64 ``(hidden,)``.
        head: float64 :data:`FUSION` ``(hidden, 2 hidden)``, reads what the norm of the embedding
            gives out, then that of the hidden state; and :data:`EMBEDDING_NORM` ``(hidden,)``.
    """
    embedded, hidden = head[FUSION].chunk(2, dim=1)
    norm, identity = head[EMBEDDING_NORM], torch.eye(len(gamma)).to(gamma)
    return {
        # The norm's weight and R1 go into what reads it, as the final norm's go into the head.
        FUSION: torch.cat([transform.head(embedded, norm), hidden], dim=1),
        EMBEDDING_NORM: transform.final_norm(norm),
        f"{DRAFT_INPUT}.weight": transform.head(identity, gamma),
        f"{DRAFT_OUTPUT}.weight": transform.hidden(identity, gamma).T,
    }


def refuse_removed_channels(spec: ModelSpec, gamma: torch.Tensor, advice: str) -> None:
    """Refuse a final norm, of stored weight ``gamma (hidden,)``, whose output says nothing of some
    channels.

    Raises:
        CheckpointError: it multiplies them by 0; what else can be done is ``advice``.
    """
    table = spec.architecture
    if (zeros := int((gamma + table.norm_offset == 0).sum())) > 0:
        raise CheckpointError(
            f"{table.final_norm}.weight of the base: expected a multiplier other than 0 for every"
            f" channel, got 0 for {zeros}: what the head drafts in these is in no hidden state of"
            f" the converted model. {advice}"
        )


def _llama_config(path: Path, spec: ModelSpec) -> dict[str, Any]:
    config = read_untransformed(path, "draft head")
    advice = (
        f"Only EAGLE heads that vLLM serves as EagleLlamaForCausalLM can be transformed. {_ONLINE}"
    )
    expected: dict[str, tuple[Any, ...]] = {
        "model_type": ("llama",),
        "architectures": (["LlamaForCausalLM"], ["EagleLlamaForCausalLM"]),
        "quantization_config": (None,),
        "hidden_size": (spec.hidden,),
        "vocab_size": (spec.vocab,),
    }
    for key, values in expected.items():
        refuse_value(path, key, values, config.get(key), advice)
    return config


def _check(tensors: dict[str, torch.Tensor], spec: ModelSpec) -> None:
    shapes = {FUSION: (spec.hidden, 2 * spec.hidden), EMBEDDING: (spec.vocab, spec.hidden)}
    if FUSION not in tensors:
        raise CheckpointError(
            f"{WEIGHTS_NAME}: expected {FUSION}, got {', '.join(sorted(tensors)[:3]) or 'nothing'}"
            " instead. Save or download the draft head again."
        )
    for name, tensor in tensors.items():
        if name not in shapes and not _UNCHANGED.fullmatch(name):
            raise UnsupportedModelError(
                f"tensor {name}: expected {', '.join(shapes)} and tensors of layers.N, which vLLM's"
                f" EagleLlamaForCausalLM reads. {_ONLINE}"
            )
        if name in shapes and tuple(tensor.shape) != shapes[name]:
            raise CheckpointError(
                f"tensor {name}: expected {shapes[name]}, got {tuple(tensor.shape)}. The head"
                " belongs to another model."
            )
        check_floats(tensor, name)
