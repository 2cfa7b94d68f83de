# SPDX-License-Identifier: Apache-2.0
"""The original model, run one decoder layer at a time in float32 while the next one is read."""

import copy
import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import nn
from transformers import AutoModel, PreTrainedModel

from smoothrot_offline.device import CPU
from smoothrot_offline.source.architecture import DENSE
from smoothrot_offline.source.checkpoint import Checkpoint, source_dtype
from smoothrot_offline.source.experts import separate_experts
from smoothrot_offline.source.family import ModelSpec
from smoothrot_offline.source.stream import LayerInStream
from smoothrot_vllm.errors import CheckpointError, ConfigError

LayerTensors = dict[str, torch.Tensor]


Observer = Callable[[torch.Tensor], None]
"""Receives what a linear reads, float32 ``(tokens, in_features)``, a chunk of sequences at a
time."""

CHUNK_TOKENS = 4096
"""Tokens whose activations are held at a time while a layer runs (one sequence at least)."""

LAYER = "layers.0"
"""Where a built model has its only layer."""

_SETTINGS_BY_LAYER = ("layer_types", "no_rope_layers")


class LayerRunner:
    """Runs single decoder layers of the original model through transformers' own code.

    Each call builds the family's base model with one layer, on the meta device, and gives that
    layer its weights: masks, sliding windows and rotary tables are then transformers' own, for any
    family, at the cost of one layer.
    """

    def __init__(self, spec: ModelSpec) -> None:
        self.spec = spec

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
            hidden: float32 ``(samples, seqlen, spec.stream)``, what the layer reads.
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

        Called with ``inputs_embeds``, the model returns what the layer makes of them, as they
        stand: they are not embeddings.
        """
        model, layer = self.skeleton(index, next(iter(weights.values())).device)
        layer.load_state_dict(
            {name: tensor.float() for name, tensor in weights.items()}, assign=True
        )
        return model, layer

    def skeleton(self, index: int, device: torch.device = CPU) -> tuple[nn.Module, nn.Module]:
        """What :meth:`build` makes, before the layer has weights: those are on the meta device,
        everything else is on ``device``."""
        model: nn.Module = self._empty(index)
        # The rotary tables are computed, not loaded, so they must be made again outside the meta
        # device. The frequencies are computed on the CPU for every device: another's powers can
        # differ in a last bit.
        model.rotary_emb = type(model.rotary_emb)(model.config).to(device)
        model.norm = nn.Identity()
        if self.spec.architecture.ends_with_more:
            model = LayerInStream(model, self.spec, index)
        return model.eval(), model.get_submodule(LAYER)

    def final_norm(self, weight: torch.Tensor) -> nn.Module:
        """The family's norm before the head, with a stored weight ``(hidden,)``, in float32."""
        norm = self._empty(0).get_submodule("norm")
        norm.load_state_dict({"weight": weight.float()}, assign=True)
        return norm

    def _empty(self, index: int) -> PreTrainedModel:
        """The base model with decoder layer ``index`` alone, on the meta device."""
        config = copy.deepcopy(self.spec.config)
        if config.is_heterogeneous:
            config.per_layer_config = None
            heads = self.spec.head_sizes(self.spec.layer_table(index))
            config.num_key_value_heads, config.head_dim = heads
        if shared := self.spec.architecture.shared_layers:
            setattr(config, shared, int(self.spec.values_of(index) != index))
        if (experts := self.spec.architecture.experts) is not None and experts.dense:
            setattr(config, experts.dense, int(self.spec.kind(index) == DENSE))
        config.num_hidden_layers = 1
        for setting in _SETTINGS_BY_LAYER:
            if getattr(config, setting, None):
                setattr(config, setting, [getattr(config, setting)[index]])
        if scale := self.spec.architecture.multipliers.embedding:
            setattr(config, scale, 1.0)
        with torch.device("meta"):
            model: PreTrainedModel = AutoModel.from_config(
                config,
                attn_implementation=self.spec.architecture.attention,
                dtype=torch.float32,
                # The configuration may name code of the directory's own, in place of which this is.
                trust_remote_code=False,
            )
        separate_experts(model.get_submodule("layers").children(), self.spec.architecture, config)
        return model


class SourceModel(LayerRunner):
    """The original model: what its files hold, and what it computes, one decoder layer at a time.

    Args:
        checkpoint: its files; everything is on the checkpoint's device.
        spec: its sizes and names.
    """

    def __init__(self, checkpoint: Checkpoint, spec: ModelSpec) -> None:
        super().__init__(spec)
        self.checkpoint = checkpoint
        table = spec.architecture
        self.embedding_name = f"{table.embedding}.weight"
        self.norm_name = f"{table.final_norm}.weight"
        self.head_name = self.embedding_name if spec.tied else f"{table.lm_head}.weight"

    @property
    def dtype(self) -> torch.dtype:
        """That of a conversion's 16-bit tensors, see :func:`source_dtype`."""
        return source_dtype(self.checkpoint, self.embedding_name)

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return self.checkpoint.device

    def tensor(self, name: str) -> torch.Tensor:
        """One tensor by its full name, in its stored dtype.

        Raises:
            CheckpointError: see :meth:`Checkpoint.load`.
        """
        return self.checkpoint.load([name])[name]

    def embed(self, tokens: torch.Tensor) -> torch.Tensor:
        """What the first layer reads: float32 ``(samples, seqlen, spec.stream)`` of int64
        ``tokens``.

        Raises:
            ConfigError: see :func:`embed`.
        """
        spec = self.spec
        hidden = embed(tokens, self.tensor(self.embedding_name), spec.embedding_scale)
        if spec.stream == spec.hidden:
            return hidden
        stream = nn.functional.pad(hidden, (0, spec.stream - spec.hidden))
        if width := spec.layer_embedding:
            given = slice(spec.hidden, spec.hidden + spec.layers * width)
            stream[..., given] = self._given_to_layers(tokens, hidden)
        return stream

    @torch.no_grad()
    def _given_to_layers(self, tokens: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        """What all layers are given of tokens beside the residual stream, ``(samples, seqlen,
        layers * width)``: of the token, and of its embedding ``hidden``."""
        rows, projection, weight = (self.tensor(name) for name in self.spec.architecture.beside)
        width = self.spec.layer_embedding
        norm = self._empty(0).get_submodule("per_layer_projection_norm")
        norm.load_state_dict({"weight": weight.float()}, assign=True)
        projected = nn.functional.linear(hidden, projection.float()) * self.spec.hidden**-0.5
        projected = norm(projected.unflatten(-1, (-1, width))).flatten(-2)
        return (projected + embed(tokens, rows, width**0.5)) * 0.5**0.5

    def layer(self, index: int) -> LayerTensors:
        """The tensors of a decoder layer, by names relative to it, in their stored dtype.

        Raises:
            CheckpointError: see :meth:`Checkpoint.load`.
        """
        return _load_layer(self.checkpoint, self.spec, index)

    def layers(self, indices: Iterable[int] | None = None) -> Iterator[tuple[int, LayerTensors]]:
        """Each of ``indices`` (all layers unless given) and its :meth:`layer`, the next one read
        and checked by a thread while the caller works on one.

        At most one layer waits, in the CPU's memory; what is wrong with it is raised when it is
        asked for.
        """
        unplaced = self.checkpoint.on(CPU)
        with ThreadPoolExecutor(1) as pool:
            waiting: tuple[int, Future[LayerTensors]] | None = None
            for index in range(self.spec.layers) if indices is None else indices:
                following = index, pool.submit(_load_layer, unplaced, self.spec, index)
                if waiting is not None:
                    yield waiting[0], self.checkpoint.placed(waiting[1].result())
                waiting = following
            if waiting is not None:
                yield waiting[0], self.checkpoint.placed(waiting[1].result())


def _load_layer(checkpoint: Checkpoint, spec: ModelSpec, index: int) -> LayerTensors:
    return checkpoint.load_relative(spec.layer_prefix(index), spec.layer_tensors(index))


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
