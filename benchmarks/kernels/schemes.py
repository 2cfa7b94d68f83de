# SPDX-License-Identifier: Apache-2.0
"""The schemes that the converter's presets write, taken from the presets: the benchmarks time
these and no others."""

import random
from collections.abc import Iterable
from functools import cache

from benchmarks.support.random_models import COMMON, SHAPES
from smoothrot_offline.config import make_schema
from smoothrot_offline.decide.study import LayerStudy, allocate
from smoothrot_offline.presets import PRESETS, configure
from smoothrot_offline.source.family import ModelSpec
from smoothrot_offline.source.resolve import resolve
from smoothrot_vllm.format import LinearScheme, QuantizationSchema

CONFIGS = {"Llama-3.2-1B": COMMON | SHAPES["1b"], "Llama-3-8B": COMMON | SHAPES["8b"]}
"""``config.json`` of the models, as far as shapes go."""
PER_CHANNEL = "paper-compat"


def preset_schema(spec: ModelSpec, preset: str, act_bits: int) -> QuantizationSchema:
    """What a preset writes for a model, the linears that it keeps at 8 bits among its
    ``overrides``.

    Which linears those are takes a calibrated model to find out. Here the costs that decide it are
    drawn at random, so that the share of the weights is the preset's and the choice among them is
    not.

    Args:
        spec: of the model.
        preset: one of ``PRESETS``, or ``paper-compat``.
        act_bits: 4 or 8, of the 4-bit weights' inputs.

    Raises:
        ConfigError: the preset's schemes do not fit the model's sizes.
    """
    config, _ = configure(preset, {"activation_bits": act_bits}, spec)
    draw = random.Random(0)
    groups = [
        tuple(linear for group in one for linear in group)
        for one in spec.architecture.scheme_groups()
    ]
    studies = []
    for _ in range(spec.layers):
        weights = {
            group[0]: sum(out * inputs for out, inputs in map(spec.linear_shape, group))
            for group in groups
        }
        studies.append(
            LayerStudy(sensitivity={first: size * draw.random() for first, size in weights.items()})
        )
    schema = make_schema(spec, config)
    return allocate(spec, config, schema, studies) if config.keep_8bit else schema


def scheme_name(scheme: LinearScheme) -> str:
    """``w4a8`` for one scale per output, ``w4a8_g64`` for groups of 64 inputs."""
    group = "" if scheme.weights.group_size == -1 else f"_g{scheme.weights.group_size}"
    return f"w{scheme.weights.bits}a{scheme.activations.bits}{group}"


def written_by(presets: Iterable[str]) -> dict[str, LinearScheme]:
    """Every scheme, by name, that these presets give a linear of Llama-3-8B, with 8-bit and with
    4-bit activations."""
    spec = resolve(CONFIGS["Llama-3-8B"])
    found: dict[str, LinearScheme] = {}
    for preset in presets:
        for act_bits in (8, 4):
            schema = preset_schema(spec, preset, act_bits)
            default = LinearScheme(weights=schema.weights, activations=schema.activations)
            head = [schema.lm_head] if schema.lm_head else []
            found |= {
                scheme_name(scheme): scheme
                for scheme in (default, *schema.overrides.values(), *head)
            }
    return found


@cache
def every_scheme() -> dict[str, LinearScheme]:
    """Those of all presets, by name: weights of 4 and 8 bits, activations of 4 and 8, one scale
    per output or per group."""
    return written_by((PER_CHANNEL, *PRESETS))
