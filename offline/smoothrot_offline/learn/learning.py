# SPDX-License-Identifier: Apache-2.0
"""R1, R2 and S learned together by the loss of the whole model, before anything is rounded.

The loss is ``KL(original || quantized)`` of the next token, with every linear's input quantized and
weights as they are: rotations learned so suit weights that are rounded with error compensation
(SpinQuant, arXiv 2405.16406, its ablation with GPTQ). What is held is one layer, and what each
layer reads.
"""

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from smoothrot_offline import ranks
from smoothrot_offline.config import ConvertConfig
from smoothrot_offline.distill.divergence import divergence
from smoothrot_offline.learn.decoder import FoldedDecoder, way_back, way_there
from smoothrot_offline.learn.folds import Folded, LearnedFolds
from smoothrot_offline.output.manifest import LearnedRecord
from smoothrot_offline.source.family import ModelSpec
from smoothrot_offline.source.layers import LayerTensors, SourceModel
from smoothrot_offline.transform.sides import LayerScales, ModelTransform
from smoothrot_vllm.format import QuantizationSchema

_log = logging.getLogger(__name__)

BATCH = 4
"""Sequences of a step."""
WARM_UP = 5
_BETAS = (0.9, 0.95)


def learning_steps(config: ConvertConfig) -> int:
    """How often :func:`learn_folds` reports progress."""
    return config.rotation_steps + 3


def learning_flop(spec: ModelSpec, config: ConvertConfig) -> float:
    """Floating-point operations of :func:`learn_folds`."""
    # Every weight is rotated on one side, as a token is multiplied by it.
    folding = 2 * spec.decoder_weights() * spec.hidden
    batch = BATCH * config.calib_seqlen
    tokens = spec.token_flop(config.calib_seqlen) * batch
    head = 2 * spec.vocab * spec.hidden * batch
    return config.rotation_steps * (4 * (folding + tokens) + 3 * head)


def learning_bytes(spec: ModelSpec, config: ConvertConfig) -> int:
    """Memory of :func:`learn_folds`."""
    batch = BATCH * config.calib_seqlen
    hidden = (batch * (spec.layers + 4) + config.calib_samples * config.calib_seqlen) * spec.stream
    graph = 6 * sum(spec.layer_weights()) + batch * (24 * spec.hidden + 8 * spec.widest)
    logits = config.calib_seqlen * 4 * spec.vocab
    turns = 8 * spec.hidden**2
    return 4 * (hidden + graph + logits + turns) + 2 * spec.vocab * spec.hidden


@dataclass(frozen=True)
class Learned:
    """What is to be folded, in float64, and how it was found; where nothing better was, what there
    was before."""

    transform: ModelTransform
    scales: Sequence[LayerScales]
    record: LearnedRecord


def learn_folds(
    source: SourceModel,
    config: ConvertConfig,
    schema: QuantizationSchema,
    start: Folded,
    tokens: torch.Tensor,
    held_out: torch.Tensor,
    step: Callable[[str], None],
) -> Learned:
    """R1 where it is folded, R2 and S, near where they start.

    Args:
        source, config: of the conversion.
        schema: bits and clips of the inputs.
        start: the chosen signs, and the scales of the study.
        tokens: calibration tokens, int64 ``(samples, seqlen)``.
        held_out: more of them, which decide whether the result is kept.
        step: told what begins, ``learning_steps`` times.

    Raises:
        CheckpointError: the model's activations are not finite.
    """
    folds = LearnedFolds(start.transform, start.scales, source.device)
    learner = Learner(FoldedDecoder(source, schema), folds)
    step("predictions of the original")
    held_out = ranks.share(held_out)
    wanted = ranks.gathered(learner.original(ranks.share(tokens)))
    wanted_held_out = learner.original(held_out)
    step("held-out loss before learning")
    before = learner.loss(held_out, wanted_held_out)
    learner.learn(tokens, wanted, config.rotation_steps, config.seed, step)
    step("held-out loss after learning")
    after = learner.loss(held_out, wanted_held_out)
    record = LearnedRecord(steps=config.rotation_steps, before=before, after=after)
    if not after < before:
        _log.warning(
            "learned rotations: the held-out loss went from %.4f to %.4f nats, so Hadamard"
            " rotations and measured scales stay. Use more or more varied text (--calib,"
            " --calib-samples).",
            before,
            after,
        )
        return Learned(start.transform, start.scales, record)
    found = folds.folded({name: one.detach() for name, one in folds.values(torch.float64).items()})
    return Learned(found.transform, found.scales, record)


class Learner:
    """Moves folds towards the original's predictions.

    Args:
        decoder: whose predictions are to be nearer to them.
        folds: in it.
    """

    def __init__(self, decoder: FoldedDecoder, folds: LearnedFolds) -> None:
        self._source = decoder.source
        self._decoder = decoder
        self._folds = folds

    @torch.no_grad()
    def original(self, tokens: torch.Tensor) -> torch.Tensor:
        """What the original's last layer gives out, float32 ``(samples, seqlen, spec.stream)``."""
        hidden = self._source.embed(tokens)
        for index, layer in self._source.layers():
            with self._decoder.autocast():
                self._source.run(index, layer, hidden, {})
        return hidden

    @torch.no_grad()
    def loss(self, tokens: torch.Tensor, wanted: torch.Tensor) -> float:
        """Mean divergence, in nats, with what has been learned, of the sequences of all ranks;
        ``wanted`` is of :meth:`original`."""
        folded = self._folds.folded(self._folds.values())
        hidden = self._decoder.embedded(tokens, folded.transform)
        for index, layer in self._source.layers():
            parts = hidden.split(BATCH)
            hidden = torch.cat(
                [self._decoder.folded_layer(index, layer, part, folded) for part in parts]
            )
        pairs = zip(hidden.split(1), wanted.split(1), strict=True)
        own = sum(float(self._divergence(*pair, folded)) for pair in pairs)
        total, samples = ranks.summed(own, len(tokens))
        return total / samples

    def learn(
        self,
        tokens: torch.Tensor,
        wanted: torch.Tensor,
        steps: int,
        seed: int,
        step: Callable[[str], None],
    ) -> None:
        """Adam on the free parameters, the rate falling to zero along a cosine."""
        optimizer = torch.optim.Adam(self._folds.groups(), betas=_BETAS)
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer,
            lambda i: min(1.0, (i + 1) / WARM_UP) * (1 + math.cos(math.pi * i / steps)) / 2,
        )
        order = torch.randperm(len(tokens), generator=torch.Generator().manual_seed(seed))
        for number in range(steps):
            step(f"learning rotations, step {number + 1} of {steps}")
            chosen = order[torch.arange(number * BATCH, (number + 1) * BATCH) % len(order)]
            optimizer.zero_grad()
            if len(own := ranks.share(chosen)):
                self.backward(tokens[own], wanted[own.to(wanted.device)], len(chosen))
            ranks.add_gradients(self._folds.free.values())
            optimizer.step()
            schedule.step()

    def backward(self, tokens: torch.Tensor, wanted: torch.Tensor, samples: int) -> None:
        """Add the gradient of the loss of ``tokens``, their part in the mean of ``samples``, to
        that of the free parameters."""
        values = self._folds.values()
        # Layers meet copies, whose gradients are summed: the way on from there is gone once.
        copies = {name: value.detach().requires_grad_() for name, value in values.items()}
        folded = self._folds.folded(copies)

        def run(index: int, layer: LayerTensors, hidden: torch.Tensor) -> torch.Tensor:
            return self._decoder.folded_layer(index, layer, hidden, folded)

        embedded = self._decoder.embedded(tokens, folded.transform)
        read = way_there(self._source, embedded.detach(), run, BATCH)
        states = read.pop().requires_grad_()
        for one, target in zip(states.split(1), wanted.split(1), strict=True):
            (self._divergence(one, target, folded) / samples).backward()
        assert states.grad is not None
        *_, gradient = way_back(self._source, read, run, states.grad, BATCH)
        if embedded.requires_grad:
            embedded.backward(gradient)
        met = [name for name, copy in copies.items() if copy.grad is not None]
        torch.autograd.backward([values[name] for name in met], [copies[name].grad for name in met])

    def _divergence(
        self, states: torch.Tensor, wanted: torch.Tensor, folded: Folded
    ) -> torch.Tensor:
        with torch.no_grad():
            target = self._decoder.logits(wanted)
        return divergence(self._decoder.folded_logits(states, folded.transform), target)
