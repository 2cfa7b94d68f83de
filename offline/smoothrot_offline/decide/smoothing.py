# SPDX-License-Identifier: Apache-2.0
"""Smoothing of a layer: down_proj's input, and what the norms give out in the basis in which a norm
multiplies by its weight.

R1 leaves a norm's weight at 1, and the server multiplies by it all the same: scales there cost
nothing at run time."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from smoothrot_offline import ranks
from smoothrot_offline.config import ConvertConfig
from smoothrot_offline.decide.policies import (
    InputStatistics,
    LayerError,
    PolicyOptions,
    SmoothingChoice,
    choose_scales,
)
from smoothrot_offline.output.manifest import SmoothingRecord
from smoothrot_offline.source.architecture import Architecture
from smoothrot_offline.source.family import ModelSpec
from smoothrot_offline.source.layers import LayerRunner, Observer, SourceModel
from smoothrot_offline.transform.rotation import Orthogonal
from smoothrot_vllm.format import QuantizationSchema


@dataclass(frozen=True)
class LayerSmoothing:
    """What was chosen for one layer.

    ``scales`` are float64 ``(channels,)``, those of one down_proj after another; ``records`` has
    one entry for each: None for an expert that no calibration token was routed to, whose scales are
    1.
    """

    scales: torch.Tensor
    records: list[SmoothingRecord | None]


def smooth_layer(
    runner: LayerRunner,
    config: ConvertConfig,
    schema: QuantizationSchema,
    index: int,
    layer: Mapping[str, torch.Tensor],
    hidden: torch.Tensor,
    observers: Mapping[str, Observer],
) -> LayerSmoothing:
    """Move ``hidden`` past decoder layer ``index`` of the original model, and choose the scales of
    its down_proj or down_projs.

    Args:
        runner, config, schema: of the conversion; ``config.scales`` is not ``none``.
        index: which layer.
        layer: its tensors by names relative to it, as in the source.
        hidden: float32 ``(samples, seqlen, spec.stream)``, what the layer reads of this rank's
            sequences; replaced by what it returns.
        observers: of other modules of the layer, while it runs.
    """
    spec = runner.spec
    assert config.scales != "none"
    table, widths, seqlen = spec.layer_table(index), spec.down_widths(index), hidden.shape[1]
    (samples,) = ranks.summed(len(hidden))
    tokens, experts = int(samples) * seqlen, spec.experts_in(index)
    routed = tokens * spec.config.num_experts_per_tok // experts if experts else tokens
    statistics = {
        down: (
            InputStatistics(width, routed, hidden.device)
            if number < experts
            else InputStatistics(width, tokens, hidden.device, seqlen)
        )
        for number, ((_, down), width) in enumerate(zip(table.products, widths, strict=True))
    }
    runner.run(
        index,
        layer,
        hidden,
        {**{down: seen.update for down, seen in statistics.items()}, **observers},
    )
    scales = torch.ones(sum(widths), dtype=torch.float64, device=hidden.device)
    records: list[SmoothingRecord | None] = []
    for own, (down, seen) in zip(scales.split(widths), statistics.items(), strict=True):
        seen.reduce()
        if not seen.tokens:
            records.append(None)
            continue
        choice = _choose(
            spec.layer_prefix(index) + down, layer[f"{down}.weight"], seen, config, schema
        )
        own.copy_(choice.scales)
        records.append(_record(config, seen, choice))
    return LayerSmoothing(scales, records)


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
    rotation = schema.online.rotation(name)
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


SAMPLE_SEQUENCES = 16
"""Calibration sequences that the norms are measured on where the whole text does not pass
anyway."""


class NormStatistics:
    """``||X_j||_2`` of what each norm of a layer gives out before its weight (R1 folded) or after
    it (R1 not folded).

    Args:
        spec: the model.
        table: of the layer.
        residual: R1, or None if it is not folded.
        layer: the layer's tensors in the original model, by names relative to it.
    """

    def __init__(
        self,
        spec: ModelSpec,
        table: Architecture,
        residual: Orthogonal | None,
        layer: Mapping[str, torch.Tensor],
    ) -> None:
        self._spec = spec
        self._table = table
        self._residual = residual
        self._gammas = {
            norm: layer[f"{norm}.weight"].double() + table.norm_offset for norm in table.norms
        }
        self._squares = {norm: torch.zeros_like(gamma) for norm, gamma in self._gammas.items()}

    def observers(self) -> dict[str, Observer]:
        """What to call with each norm's input, by the norm's name."""
        return {norm: self._observer(norm) for norm in self._gammas}

    def reduce(self) -> None:
        """Take in what the other ranks have seen."""
        ranks.add(*self._squares.values())

    def scales(
        self, layer: Mapping[str, torch.Tensor], dtype: torch.dtype
    ) -> dict[str, torch.Tensor]:
        """``s_j = (||X_j|| / ||W_j||)^(1/2)`` of each norm, W its readers in the same basis: see
        ``l2`` of ``choose_scales``.

        The scales are such that the norm's new weight is a number of ``dtype``: nothing is lost
        where it is stored.

        Args:
            layer: as for the statistics.
            dtype: of the norms in the output.
        """
        return {norm: self._scales_of(norm, layer, dtype) for norm in self._gammas}

    def _observer(self, norm: str) -> Observer:
        def observe(x: torch.Tensor) -> None:
            variance = x.square().mean(dim=1, keepdim=True)
            out = self._in_basis(x * (variance + self._spec.config.rms_norm_eps).rsqrt(), norm)
            self._squares[norm] = self._squares[norm] + out.square().sum(dim=0)

        return observe

    def _in_basis(self, rows: torch.Tensor, norm: str) -> torch.Tensor:
        return (
            rows.double() * self._gammas[norm]
            if self._residual is None
            else self._residual.rotate(rows.double())
        )

    def _scales_of(
        self, norm: str, layer: Mapping[str, torch.Tensor], dtype: torch.dtype
    ) -> torch.Tensor:
        table, gamma = self._table, self._gammas[norm]
        weight = torch.cat([layer[f"{reader}.weight"].double() for reader in table.readers[norm]])
        if self._residual is not None:
            weight, gamma = self._residual.rotate(weight * gamma), torch.ones_like(gamma)
        inputs, columns = self._squares[norm].sqrt(), weight.norm(dim=0)
        used = (inputs > 0) & (columns > 0)
        wanted = torch.where(used, (inputs / columns.where(used, 1.0)).sqrt(), 1.0)
        wanted = wanted / wanted[used].log().mean().exp() if used.any() else wanted
        return storable_scales(torch.where(used, wanted, 1.0), gamma, table.norm_offset, dtype)


def storable_scales(
    wanted: torch.Tensor, gamma: torch.Tensor, offset: float, dtype: torch.dtype
) -> torch.Tensor:
    """The scales nearest to ``wanted`` for which a norm's new weight is a number of ``dtype``: then
    nothing is lost where it is stored. 1 where there is none.

    Args:
        wanted: float64 ``(hidden,)``, positive.
        gamma: what the norm multiplies by without them, float64 ``(hidden,)``.
        offset: what the norm adds to its weight.
    """
    stored = (gamma / wanted - offset).to(dtype).double() + offset
    return torch.where(stored * gamma > 0, gamma / stored, 1.0)


def norm_samples(samples: int) -> int:
    """How many of the calibration's sequences :func:`smooth_norms` runs."""
    return min(samples, SAMPLE_SEQUENCES)


@torch.no_grad()
def smooth_norms(
    source: SourceModel,
    residual: Orthogonal | None,
    tokens: torch.Tensor,
    step: Callable[[str], None],
) -> list[dict[str, torch.Tensor]]:
    """Scales of the norms of every layer for a transform that was chosen after the study.

    Args:
        source: the original model.
        residual: R1 as it will be folded.
        tokens: calibration tokens, int64 ``(samples, seqlen)``.
        step: told what begins, once for each layer.

    Raises:
        CheckpointError: the model's activations are not finite.
    """
    hidden, found = source.embed(ranks.share(tokens[: norm_samples(len(tokens))])), []
    for index, layer in source.layers():
        step(f"smoothing the norms of layer {index + 1} of {source.spec.layers}")
        statistics = NormStatistics(source.spec, source.spec.layer_table(index), residual, layer)
        source.run(index, layer, hidden, statistics.observers())
        statistics.reduce()
        found.append(statistics.scales(layer, source.dtype))
    return found
