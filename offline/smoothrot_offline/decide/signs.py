# SPDX-License-Identifier: Apache-2.0
"""How well a conversion with given random signs predicts held-out text."""

from collections.abc import Sequence

import torch
from torch import nn

from smoothrot_offline import ranks
from smoothrot_offline.decide.study import LayerStudy
from smoothrot_offline.rounding.rtn import quantize_rtn
from smoothrot_offline.rounding.served import inputs_through, output_of, quantizers, rotations
from smoothrot_offline.source.layers import SourceModel
from smoothrot_offline.transform.sides import ModelTransform
from smoothrot_vllm.format import QuantizationSchema

_LOGIT_ROWS = 512


@torch.no_grad()
def trial_loss(
    source: SourceModel,
    schema: QuantizationSchema,
    transform: ModelTransform,
    studies: Sequence[LayerStudy],
    tokens: torch.Tensor,
) -> float:
    """Mean negative log-likelihood in nats of ``tokens (samples, seqlen)`` under the model as a
    conversion would quantize it.

    Weights are rounded to nearest whatever the conversion's own rounding, which would take as long
    as a conversion; the head stays in full precision. One decoder layer is held at a time.

    Args:
        source: the original model.
        schema: bits, groups and clips of every linear.
        transform: with the signs on trial.
        studies: the smoothing scales of each layer.
        tokens: held-out calibration text, int64.
    """
    spec, tokens = source.spec, ranks.share(tokens)
    hidden = transform.embedding(source.embed(tokens).double()).float()
    for index, loaded in source.layers():
        prefix, table = spec.layer_prefix(index), spec.layer_table(index)
        layer = {name: tensor.double() for name, tensor in loaded.items()}
        transform.layer(index, layer, studies[index].scales)
        schemes = {linear: schema.scheme(prefix + linear) for linear in table.linears}
        for linear, scheme in schemes.items():
            if scheme is not None:
                name = f"{linear}.weight"
                layer[name] = quantize_rtn(layer[name], scheme.weights, prefix + name).dequantize()
        model, module = source.build(index, layer)
        with inputs_through(
            module, rotations(table, schema.online) | quantizers(schemes, schema.online)
        ):
            hidden = torch.cat([output_of(model, part) for part in hidden.split(1)])
    return _loss(source, transform, hidden, tokens)


def _loss(
    source: SourceModel, transform: ModelTransform, hidden: torch.Tensor, tokens: torch.Tensor
) -> float:
    gamma = source.tensor(source.norm_name).double()
    head = torch.cat(
        [
            transform.head(rows.double(), gamma).float()
            for rows in source.tensor(source.head_name).split(4096)
        ]
    )
    norm = source.final_norm(transform.final_norm(gamma).float())
    states = norm(hidden[..., : source.spec.hidden])[:, :-1].flatten(0, 1)
    total = 0.0
    following = tokens[:, 1:].flatten().to(states.device)
    for rows, targets in zip(states.split(_LOGIT_ROWS), following.split(_LOGIT_ROWS), strict=True):
        total += nn.functional.cross_entropy(
            source.spec.capped(rows @ head.T), targets, reduction="sum"
        ).item()
    total, rows_in_all = ranks.summed(total, len(states))
    return total / rows_in_all
