# SPDX-License-Identifier: Apache-2.0
"""What each decoder layer needs, found by running the original model once, layer by layer: the
smoothing scales of its down_proj, the clip of each input, and which linears keep 8 bits."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from math import prod

import torch
from torch import nn

from smoothrot_offline import ranks
from smoothrot_offline.config import ACTIVATION_CLIP, ConvertConfig
from smoothrot_offline.decide.smoothing import NormStatistics, smooth_layer
from smoothrot_offline.output.manifest import SmoothingRecord
from smoothrot_offline.rounding.rtn import fake_quantize_tokens, quantize_rtn
from smoothrot_offline.rounding.served import (
    InputMap,
    inputs_through,
    output_of,
    quantizers,
    rotations,
)
from smoothrot_offline.source.architecture import Architecture
from smoothrot_offline.source.family import ModelSpec
from smoothrot_offline.source.layers import SourceModel
from smoothrot_offline.transform.sides import LayerScales, ModelTransform
from smoothrot_vllm.format import (
    ActivationScheme,
    LinearScheme,
    QuantizationSchema,
    WeightScheme,
)

PROBE_SAMPLES = 8
"""Calibration sequences on which clips and sensitivities are measured."""
CLIP_TOKENS = 1024
CLIPS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6, 0.55, 0.5)
"""Candidate clips of 4-bit activations; 8-bit ones keep all of their range (255 levels lose more
to a clipped outlier)."""


@dataclass(frozen=True)
class LayerStudy:
    """What was found for one decoder layer.

    ``scales`` are S; ``experts`` are the ``smoothing`` of each expert, None for one that no
    calibration token was routed to, and ``smoothing`` then that of a shared one. ``clips`` and
    ``sensitivity`` are by the first linear of each group that reads one input, all of a layer's
    experts but a shared one being one group: the clip with the least error, and the mean ``KL`` of
    a token, in nats and to second order, when only that group is quantized. Both are empty unless
    the configuration asks for them.
    """

    scales: LayerScales = field(default_factory=LayerScales)
    smoothing: SmoothingRecord | None = None
    clips: dict[str, float] = field(default_factory=dict)
    sensitivity: dict[str, float] = field(default_factory=dict)
    experts: list[SmoothingRecord | None] = field(default_factory=list)

    @property
    def unseen_experts(self) -> list[int]:
        """Numbers of the experts that no calibration token was routed to."""
        return [number for number, record in enumerate(self.experts) if record is None]


class Study:
    """Studies the layers of one model in order.

    Args:
        source, config, schema, transform: of the conversion; ``schema`` has the bits and groups
            asked for.
        tokens: calibration tokens, int64 ``(samples, seqlen)``.
        gradients: in what each layer gives out, of this rank's share of the first
            ``PROBE_SAMPLES`` sequences, if ``config.keep_8bit``.
    """

    def __init__(
        self,
        source: SourceModel,
        config: ConvertConfig,
        schema: QuantizationSchema,
        transform: ModelTransform,
        tokens: torch.Tensor,
        gradients: Sequence[torch.Tensor] = (),
    ) -> None:
        self._source = source
        self._config = config
        self._schema = schema
        self._transform = transform
        self._hidden = hidden = source.embed(ranks.share(tokens))
        probe = tokens[:PROBE_SAMPLES]
        self._probe = transform.embedding(hidden[: len(ranks.share(probe))].double()).float()
        self._probe_tokens = probe.numel()
        self._gradients = gradients

    def layer(self, index: int, tensors: dict[str, torch.Tensor]) -> LayerStudy:
        """Study decoder layer ``index``; call in order.

        Args:
            index: which layer.
            tensors: its tensors by names relative to it, as in the source.
        """
        study = LayerStudy()
        if self._config.scales != "none":
            scales, found = self._smoothed(index, tensors)
            experts = self._source.spec.experts_in(index)
            study = LayerStudy(scales, next(iter(found[experts:]), None), experts=found[:experts])
        return (
            self._probed(index, self._folded(index, tensors, study.scales), study)
            if self._config.needs_probe
            else study
        )

    def _folded(
        self, index: int, tensors: dict[str, torch.Tensor], scales: LayerScales
    ) -> dict[str, torch.Tensor]:
        """The transformed layer, float32."""
        folded = {name: tensor.double() for name, tensor in tensors.items()}
        self._transform.layer(index, folded, scales)
        return {name: folded.pop(name).float() for name in list(folded)}

    def _smoothed(
        self, index: int, tensors: dict[str, torch.Tensor]
    ) -> tuple[LayerScales, list[SmoothingRecord | None]]:
        norms = (
            NormStatistics(
                self._source.spec,
                self._source.spec.layer_table(index),
                self._transform.residual,
                tensors,
            )
            if self._config.smooths_norms
            else None
        )
        observers = {} if norms is None else norms.observers()
        found = smooth_layer(
            self._source, self._config, self._schema, index, tensors, self._hidden, observers
        )
        if norms is not None:
            norms.reduce()
        return (
            LayerScales(
                found.scales, {} if norms is None else norms.scales(tensors, self._source.dtype)
            ),
            found.records,
        )

    @torch.no_grad()
    def _probed(
        self, index: int, tensors: dict[str, torch.Tensor], study: LayerStudy
    ) -> LayerStudy:
        """The study with what is measured on the transformed layer; moves the probe past it."""
        prefix = self._source.spec.layer_prefix(index)
        table = self._source.spec.layer_table(index)
        model, layer = self._source.build(index, tensors)
        clips, sensitivity = {}, {}
        turned = rotations(table, self._schema.online)
        exact, inputs = self._exact(model, layer, table, turned)
        if self._config.keep_8bit:
            gradient = self._transform.embedding(self._gradients[index].double()).float()
        for groups in table.scheme_groups():
            first = groups[0][0]
            scheme = self._schema.scheme(prefix + first)
            if scheme is None:
                continue
            if self._config.clip_search and scheme.activations.bits == 4:
                read = (
                    (inputs[group[0]], torch.cat([tensors[f"{linear}.weight"] for linear in group]))
                    for group in groups
                )
                clips[first] = best_clip(read, scheme.activations)
            if self._config.keep_8bit:
                scheme = with_clip(scheme, clips.get(first))
                linears = [linear for group in groups for linear in group]
                schemes = dict.fromkeys(linears, scheme)
                maps = turned | quantizers(schemes, self._schema.online)
                error = self._error(model, layer, schemes, maps, exact)
                (cost,) = ranks.summed(float((error * gradient).sum(-1).square().sum()))
                sensitivity[first] = cost / self._probe_tokens / 2
        self._probe = exact
        return replace(study, clips=clips, sensitivity=sensitivity)

    def _exact(
        self,
        model: nn.Module,
        layer: nn.Module,
        table: Architecture,
        turned: Mapping[str, InputMap],
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """What the layer makes of the probe, and a sample of what each group of linears reads:
        rotated, not quantized.

        Of an expert those are the tokens routed to it, ``(0, channels)`` if there are none.
        """
        spec, groups = self._source.spec, list(chain.from_iterable(table.scheme_groups()))
        seen = {
            group[0]: [self._probe.new_empty(0, spec.linear_shape(group[0], table)[1])]
            for group in groups
        }
        stride = max(1, self._probe_tokens // CLIP_TOKENS) | 1

        def watching(linear: str) -> InputMap:
            def watch(x: torch.Tensor) -> torch.Tensor:
                y = turned[linear](x) if linear in turned else x
                seen[linear].append(y.flatten(0, -2)[::stride])
                return y

            return watch

        with inputs_through(layer, {**turned, **{linear: watching(linear) for linear in seen}}):
            exact = self._run(model)
        return exact, {linear: torch.cat(parts) for linear, parts in seen.items()}

    def _error(
        self,
        model: nn.Module,
        layer: nn.Module,
        schemes: Mapping[str, LinearScheme],
        maps: Mapping[str, InputMap],
        exact: torch.Tensor,
    ) -> torch.Tensor:
        """That of the layer's output with only the given linears quantized, round-to-nearest, and
        inputs read through ``maps``."""
        modules = {linear: layer.get_submodule(linear) for linear in schemes}
        originals = {linear: module.weight.data for linear, module in modules.items()}
        for linear, module in modules.items():
            module.weight.data = quantize_rtn(
                originals[linear], schemes[linear].weights
            ).dequantize()
        with inputs_through(layer, maps):
            found = self._run(model)
        for linear, module in modules.items():
            module.weight.data = originals[linear]
        return found - exact

    def _run(self, model: nn.Module) -> torch.Tensor:
        return torch.cat([output_of(model, part) for part in self._probe.split(1)])


def best_clip(read: Iterable[tuple[torch.Tensor, torch.Tensor]], scheme: ActivationScheme) -> float:
    """The element of ``CLIPS`` with which quantizing x changes ``x W^T`` the least.

    Each token counts relative to its own output, so that a massive one does not decide for all.

    Args:
        read: pairs of x ``(tokens, K)``, in each rank its own, and W ``(N, K)``, float32: one, or
            those of all linears that must have the same clip.
        scheme: the bits.
    """
    errors = dict.fromkeys(CLIPS, 0.0)
    for x, weight in read:
        size = (x @ weight.T).square().sum(dim=1).clamp_min(torch.finfo(torch.float32).tiny)
        for clip in CLIPS:
            change = fake_quantize_tokens(x, scheme.model_copy(update={"clip": clip})) - x
            errors[clip] += float(((change @ weight.T).square().sum(dim=1) / size).sum())
    errors = dict(zip(CLIPS, ranks.summed(*errors.values()), strict=True))
    return min(CLIPS, key=errors.__getitem__)


def with_clip(scheme: LinearScheme, clip: float | None) -> LinearScheme:
    """The scheme with another activation clip, or as it is for None."""
    if clip is None:
        return scheme
    return scheme.model_copy(
        update={"activations": scheme.activations.model_copy(update={"clip": clip})}
    )


EIGHT_BITS = LinearScheme(
    weights=WeightScheme(bits=8), activations=ActivationScheme(bits=8, clip=ACTIVATION_CLIP[8])
)


def allocate(
    spec: ModelSpec,
    config: ConvertConfig,
    schema: QuantizationSchema,
    studies: Sequence[LayerStudy],
) -> QuantizationSchema:
    """The schema with the decisions of a study as overrides: 8 bits where 4 cost the most, and each
    input's own clip.

    Groups of linears that read one input (and that a server fuses) are decided together, and so are
    all experts of a layer. They are taken by measured cost for each weight, dearest first, until
    ``config.keep_8bit`` of the decoder's weights are spent.
    """
    kept = _dearest(spec, config.keep_8bit, studies)
    overrides = dict(schema.overrides)
    for index, found in enumerate(studies):
        table = spec.layer_table(index)
        for group in _scheme_groups(table):
            for linear in group:
                name = spec.layer_prefix(index) + linear
                scheme = schema.scheme(name)
                if scheme is None:
                    continue
                changed = (
                    EIGHT_BITS
                    if (index, group[0]) in kept
                    else with_clip(scheme, found.clips.get(group[0]))
                )
                if changed != scheme:
                    overrides[name] = changed
                    if linear in table.repeated:
                        overrides[spec.layer_prefix(index) + table.repeated[linear]] = changed
    return schema.model_copy(update={"overrides": overrides})


def _dearest(
    spec: ModelSpec, fraction: float, studies: Sequence[LayerStudy]
) -> set[tuple[int, str]]:
    """``(layer, first linear of the group)`` of each group that keeps 8 bits."""
    weights = {
        (index, group[0]): sum(prod(spec.linear_shape(linear, table)) for linear in group)
        for index, table in enumerate(map(spec.layer_table, range(spec.layers)))
        for group in _scheme_groups(table)
    }
    left = fraction * sum(weights.values())
    measured = (
        (index, group, cost)
        for index, found in enumerate(studies)
        for group, cost in found.sensitivity.items()
    )
    kept = set()
    for _, index, group in sorted(
        ((cost / weights[index, group], index, group) for index, group, cost in measured),
        reverse=True,
    ):
        if weights[index, group] <= left:
            left -= weights[index, group]
            kept.add((index, group))
    return kept


def _scheme_groups(table: Architecture) -> list[tuple[str, ...]]:
    return [tuple(chain.from_iterable(groups)) for groups in table.scheme_groups()]
