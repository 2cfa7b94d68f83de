# SPDX-License-Identifier: Apache-2.0
"""What distillation will take, from sizes alone."""

from smoothrot_offline.config import ConvertConfig
from smoothrot_offline.distill.training import BATCH, HELD_OUT, MOST_SEQUENCES
from smoothrot_offline.source.family import ModelSpec
from smoothrot_offline.source.text import GENERATED, GENERATING_PASSES

_BYTES_PER_WEIGHT = 8
"""The original and the scaled codes, in float32."""
_OVERHEAD = 2.2
"""Time of a step by that of its matrix products, as measured on SmolLM2-135M alone; quantizers and
the loss take the rest."""


def distillation_sequences(config: ConvertConfig) -> int:
    """How many are trained on; more steps go over them again."""
    # Text that the model must generate is dear.
    most = config.calib_samples if config.calib == GENERATED else MOST_SEQUENCES
    return min(config.distill_steps * BATCH, most)


def distillation_steps(config: ConvertConfig) -> int:
    """How often distillation reports progress."""
    return config.distill_steps + 2 if config.distill_steps else 0


def distillation_flop(spec: ModelSpec, config: ConvertConfig) -> float:
    """Floating-point operations that take as long as distillation."""
    # Forward twice, and once backward: there is no gradient of a weight.
    passes = _OVERHEAD * (3 * BATCH * config.distill_steps + 4 * HELD_OUT)
    if config.calib == GENERATED:
        passes += GENERATING_PASSES * (distillation_sequences(config) + HELD_OUT)
    head = 2 * spec.vocab * spec.hidden
    per_token = spec.token_flop(config.calib_seqlen) + head
    return passes * config.calib_seqlen * per_token if config.distill_steps else 0.0


def distillation_bytes(spec: ModelSpec, config: ConvertConfig) -> int:
    """Peak memory of distillation; 0 without."""
    if not config.distill_steps:
        return 0
    weights = spec.layers * sum(spec.layer_weights()) + 2 * spec.vocab * spec.hidden
    # Numbers that a token leaves for the way back: each linear quantizes its input by itself. With
    # them 14 GB are estimated of SmolLM2-135M, which takes 14.4.
    kept = spec.layers * (40 * spec.hidden + 12 * spec.intermediate) + 6 * spec.vocab
    return _BYTES_PER_WEIGHT * weights + 4 * BATCH * config.calib_seqlen * kept
