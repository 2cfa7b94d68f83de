# SPDX-License-Identifier: Apache-2.0
"""The smoothing stage of a conversion: run a layer of the original model on the calibration tokens, and choose its scales."""

from collections.abc import Mapping

import torch

from smoothrot_offline.architectures import ModelSpec
from smoothrot_offline.calibrate import LayerRunner, Observer
from smoothrot_offline.config import ConvertConfig
from smoothrot_offline.manifest import SmoothingRecord
from smoothrot_offline.smooth.layer_error import LayerError
from smoothrot_offline.smooth.policies import PolicyOptions, SmoothingChoice, choose_scales
from smoothrot_offline.smooth.statistics import InputStatistics
from smoothrot_vllm.format import QuantizationSchema


def smooth_layer(
    index: int,
    layer: Mapping[str, torch.Tensor],
    hidden: torch.Tensor,
    runner: LayerRunner,
    spec: ModelSpec,
    config: ConvertConfig,
    schema: QuantizationSchema,
    observers: Mapping[str, Observer],
) -> tuple[SmoothingChoice, SmoothingRecord]:
    """Move ``hidden`` past decoder layer ``index`` of the original model, and choose the scales of its down_proj.

    Args:
        index: which layer.
        layer: its tensors by names relative to it, as in the source.
        hidden: float32 ``(samples, seqlen, hidden)``, what the layer reads; replaced by what it returns.
        runner, spec, config, schema: of the conversion; ``config.scales`` is not ``none``.
        observers: of other modules of the layer, while it runs.
    """
    assert config.scales != "none"
    down = spec.architecture.down
    statistics = InputStatistics(spec.intermediate, hidden.shape[0] * hidden.shape[1])
    runner.run(index, layer, hidden, {down: statistics.update, **observers})
    scheme = schema.scheme(spec.layer_prefix(index) + down)
    assert scheme is not None
    rotation = schema.online.down_proj
    error = LayerError(statistics.sample, layer[f"{down}.weight"].float(), scheme, rotation.block if rotation else 0)
    choice = choose_scales(config.scales, statistics, error, PolicyOptions(config.alpha, config.quantile))
    record = SmoothingRecord(
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
    return choice, record
