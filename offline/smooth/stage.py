# SPDX-License-Identifier: Apache-2.0
"""The smoothing stage of a conversion: run a layer of the original model on the calibration
tokens, and choose its scales."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from smoothrot_offline.architectures import ModelSpec
from smoothrot_offline.calibrate import LayerRunner, Observer
from smoothrot_offline.config import ConvertConfig
from smoothrot_offline.manifest import SmoothingRecord
from smoothrot_offline.smooth.layer_error import LayerError
from smoothrot_offline.smooth.policies import PolicyOptions, SmoothingChoice, choose_scales
from smoothrot_offline.smooth.statistics import InputStatistics
from smoothrot_vllm.format import QuantizationSchema


@dataclass(frozen=True)
class LayerSmoothing:
    """What was chosen for one layer.

    ``scales`` are float64 in the shape ``ModelSpec.smoothed``; ``records`` has one entry for its
    down_proj, or for that of each
    expert: None for an expert that no calibration token was routed to, whose scales are 1.
    """

    scales: torch.Tensor
    records: list[SmoothingRecord | None]


def smooth_layer(
    index: int,
    layer: Mapping[str, torch.Tensor],
    hidden: torch.Tensor,
    runner: LayerRunner,
    spec: ModelSpec,
    config: ConvertConfig,
    schema: QuantizationSchema,
    observers: Mapping[str, Observer],
) -> LayerSmoothing:
    """Move ``hidden`` past decoder layer ``index`` of the original model, and choose the scales of
    its down_proj or down_projs.

    Args:
        index: which layer.
        layer: its tensors by names relative to it, as in the source.
        hidden: float32 ``(samples, seqlen, hidden)``, what the layer reads; replaced by what it
            returns.
        runner, spec, config, schema: of the conversion; ``config.scales`` is not ``none``.
        observers: of other modules of the layer, while it runs.
    """
    assert config.scales != "none"
    tokens = hidden.shape[0] * hidden.shape[1]
    if spec.experts:
        tokens = tokens * spec.config.num_experts_per_tok // spec.experts
    statistics = {
        down: InputStatistics(spec.intermediate, tokens, hidden.device)
        for _, down in spec.architecture.products
    }
    runner.run(
        index,
        layer,
        hidden,
        {**{down: seen.update for down, seen in statistics.items()}, **observers},
    )
    scales = torch.ones(
        len(statistics), spec.intermediate, dtype=torch.float64, device=hidden.device
    )
    records: list[SmoothingRecord | None] = []
    for row, (down, seen) in zip(scales, statistics.items(), strict=True):
        if not seen.tokens:
            records.append(None)
            continue
        choice = _choose(
            spec.layer_prefix(index) + down, layer[f"{down}.weight"], seen, config, schema
        )
        row.copy_(choice.scales)
        records.append(_record(config, seen, choice))
    return LayerSmoothing(scales.view(spec.smoothed), records)


def _choose(
    name: str,
    weight: torch.Tensor,
    statistics: InputStatistics,
    config: ConvertConfig,
    schema: QuantizationSchema,
) -> SmoothingChoice:
    assert config.scales != "none"
    scheme = schema.scheme(name)
    assert scheme is not None
    rotation = schema.online.down_proj
    error = LayerError(statistics.sample, weight.float(), scheme, rotation.block if rotation else 0)
    return choose_scales(
        config.scales, statistics, error, PolicyOptions(config.alpha, config.quantile)
    )


def _record(
    config: ConvertConfig, statistics: InputStatistics, choice: SmoothingChoice
) -> SmoothingRecord:
    return SmoothingRecord(
        policy=config.scales,
        statistic=choice.statistic,
        alpha=choice.alpha,
        quantile=choice.quantile,
        error=choice.error,
        activation_max=float(statistics.largest.max()),
        scale_min=float(choice.scales.min()),
        scale_max=float(choice.scales.max()),
        scale_geometric_mean=float(choice.scales.log().mean().exp()),
    )
