# SPDX-License-Identifier: Apache-2.0
"""What distillation will take, from sizes alone."""

from smoothrot_offline.config import ConvertConfig
from smoothrot_offline.source.family import ModelSpec
from smoothrot_offline.source.text import GENERATED, GENERATING_PASSES

BATCH = 4
"""Sequences of a step."""
HELD_OUT = 8
"""Sequences that decide whether the result is kept; no step sees them."""
MOST_SEQUENCES = 512
"""Of a text."""
_BYTES_PER_WEIGHT = 8
"""The original and the scaled codes, in float32."""
_OVERHEAD = 1.1
"""Time of a step by that of its matrix products in float32, as measured on SmolLM2-135M alone;
where the hardware multiplies bfloat16 it takes 0.6 of that."""


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
    weights = spec.decoder_weights() + 2 * spec.vocab * spec.hidden
    # Numbers that a token leaves for the way back, of one sequence at a time. With the process
    # itself 4.1 GB are estimated of SmolLM2-135M, which takes 3.7.
    kept = spec.layers * (24 * spec.hidden + 8 * spec.widest) + 6 * spec.vocab
    return _BYTES_PER_WEIGHT * weights + 4 * config.calib_seqlen * kept
