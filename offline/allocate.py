# SPDX-License-Identifier: Apache-2.0
"""Mixed precision: which linears keep 8 bits, from what a study measured, and the schema that
follows from a study."""

from collections.abc import Sequence
from itertools import chain

from smoothrot_offline.architectures import ModelSpec
from smoothrot_offline.config import ACTIVATION_CLIP, ConvertConfig
from smoothrot_offline.study import LayerStudy, with_clip
from smoothrot_vllm.format import ActivationScheme, LinearScheme, QuantizationSchema

EIGHT_BIT_ACTIVATIONS = ActivationScheme(bits=8, clip=ACTIVATION_CLIP[8])


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
    groups = _scheme_groups(spec)
    kept = _dearest(spec, config.keep_8bit, studies)
    overrides = dict(schema.overrides)
    for index, found in enumerate(studies):
        for group in groups:
            for linear in group:
                name = spec.layer_prefix(index) + linear
                scheme = schema.scheme(name)
                if scheme is None:
                    continue
                changed = (
                    _eight_bits(scheme)
                    if (index, group[0]) in kept
                    else with_clip(scheme, found.clips.get(group[0]))
                )
                if changed != scheme:
                    overrides[name] = changed
    return schema.model_copy(update={"overrides": overrides})


def _eight_bits(scheme: LinearScheme) -> LinearScheme:
    return LinearScheme(
        weights=scheme.weights.model_copy(update={"bits": 8}), activations=EIGHT_BIT_ACTIVATIONS
    )


def _dearest(
    spec: ModelSpec, fraction: float, studies: Sequence[LayerStudy]
) -> set[tuple[int, str]]:
    """``(layer, first linear of the group)`` of each group that keeps 8 bits."""
    weights = {
        group[0]: sum(out * inputs for out, inputs in map(spec.linear_shape, group))
        for group in _scheme_groups(spec)
    }
    left = fraction * spec.layers * sum(weights.values())
    measured = (
        (index, group, cost)
        for index, found in enumerate(studies)
        for group, cost in found.sensitivity.items()
    )
    kept = set()
    for _, index, group in sorted(
        ((cost / weights[group], index, group) for index, group, cost in measured), reverse=True
    ):
        if weights[group] <= left:
            left -= weights[group]
            kept.add((index, group))
    return kept


def _scheme_groups(spec: ModelSpec) -> list[tuple[str, ...]]:
    return [tuple(chain.from_iterable(groups)) for groups in spec.architecture.scheme_groups()]
