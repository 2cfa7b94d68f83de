# SPDX-License-Identifier: Apache-2.0
"""Which random signs to rotate with: the seed whose converted model predicts held-out
calibration text best."""

from collections.abc import Sequence

import torch
from torch import nn

from smoothrot_offline.architectures import ModelSpec
from smoothrot_offline.calibrate import LayerRunner, embed
from smoothrot_offline.checkpoint import Checkpoint
from smoothrot_offline.quantize import quantize_rtn
from smoothrot_offline.runtime import inputs_through, output_of, quantisers, rotations
from smoothrot_offline.study import LayerStudy
from smoothrot_offline.transform import ModelTransform
from smoothrot_vllm.format import QuantizationSchema

_LOGIT_ROWS = 512


@torch.no_grad()
def trial_loss(
    checkpoint: Checkpoint,
    spec: ModelSpec,
    schema: QuantizationSchema,
    transform: ModelTransform,
    studies: Sequence[LayerStudy],
    tokens: torch.Tensor,
) -> float:
    """Mean negative log-likelihood in nats of ``tokens (samples, seqlen)`` under the model as a
    conversion would quantise it.

    Weights are rounded to nearest whatever the conversion's own rounding, which would take as long
    as a conversion; the head stays in full precision. One decoder layer is held at a time.

    Args:
        checkpoint, spec: the original model.
        schema: bits, groups and clips of every linear.
        transform: with the signs on trial.
        studies: the smoothing scales of each layer.
        tokens: held-out calibration text, int64.
    """
    table = spec.architecture
    embedding = checkpoint.load([f"{table.embedding}.weight"])[f"{table.embedding}.weight"]
    hidden = transform.embedding(embed(tokens, embedding, spec.embedding_scale).double()).float()
    runner = LayerRunner(spec)
    for index, study in enumerate(studies):
        prefix = spec.layer_prefix(index)
        loaded = checkpoint.load_relative(prefix, spec.layer_tensors())
        layer = {name: tensor.double() for name, tensor in loaded.items()}
        transform.layer(index, layer, study.scales)
        schemes = {linear: schema.scheme(prefix + linear) for linear in table.linears}
        for linear, scheme in schemes.items():
            if scheme is not None:
                name = f"{linear}.weight"
                layer[name] = quantize_rtn(layer[name], scheme.weights, prefix + name).dequantize()
        model, module = runner.build(index, layer)
        with inputs_through(
            module, rotations(spec, schema.online) | quantisers(schemes, schema.online)
        ):
            hidden = torch.cat([output_of(model, part) for part in hidden.split(1)])
    return _loss(checkpoint, spec, runner, transform, hidden, tokens)


def _loss(
    checkpoint: Checkpoint,
    spec: ModelSpec,
    runner: LayerRunner,
    transform: ModelTransform,
    hidden: torch.Tensor,
    tokens: torch.Tensor,
) -> float:
    table = spec.architecture
    gamma = checkpoint.load([f"{table.final_norm}.weight"])[f"{table.final_norm}.weight"].double()
    source = f"{table.embedding if spec.tied else table.lm_head}.weight"
    head = torch.cat(
        [
            transform.head(rows.double(), gamma).float()
            for rows in checkpoint.load([source])[source].split(4096)
        ]
    )
    states = runner.final_norm(transform.final_norm(gamma).float())(hidden)[:, :-1].flatten(0, 1)
    total = 0.0
    following = tokens[:, 1:].flatten().to(states.device)
    for rows, targets in zip(states.split(_LOGIT_ROWS), following.split(_LOGIT_ROWS), strict=True):
        total += nn.functional.cross_entropy(
            spec.capped(rows @ head.T), targets, reduction="sum"
        ).item()
    return total / len(states)
