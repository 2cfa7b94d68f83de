# SPDX-License-Identifier: Apache-2.0
"""What a conversion will take: its peak memory and its time on this machine, from the sizes of
the model alone."""

import hashlib
import math
import resource
import time
from collections.abc import Callable
from functools import cache

import torch

from smoothrot_offline.architectures import ModelSpec, resolve
from smoothrot_offline.calibrate import CHUNK_TOKENS
from smoothrot_offline.calibration_data import GENERATED
from smoothrot_offline.checkpoint import Checkpoint, source_dtype
from smoothrot_offline.config import MEBIBYTE, ConvertConfig
from smoothrot_offline.convert import HEAD_ROWS
from smoothrot_offline.decide import HELD_OUT_SAMPLES, smooths_anew
from smoothrot_offline.layer import store
from smoothrot_offline.quantize import quantize_rtn
from smoothrot_offline.rotate import hadamard
from smoothrot_offline.rotations.stage import SAMPLE_SEQUENCES, learning_bytes, learning_flop
from smoothrot_offline.sizes import Sizes, header_table, measure, output_sizes
from smoothrot_offline.smooth.learned import STEPS
from smoothrot_offline.smooth.policies import searched_candidates
from smoothrot_offline.smooth.statistics import SAMPLE_TOKENS
from smoothrot_offline.study import PROBE_SAMPLES
from smoothrot_vllm.format import WeightScheme

TIME_METHOD = (
    "FLOP of every pass over calibration tokens over the rate of a float32 matrix product, weights"
    " over the rate of folding and quantising a sample on one process, bytes over the rate of"
    " SHA-256, all three measured for a moment on this machine now"
)
MEMORY_METHOD = (
    "this process now, plus eight fifths of: the calibration's hidden states, one shard or the"
    " embedding, and the largest of a decoder layer run in float32, the same layer folded in"
    " float64 with the samples that rotations are learned from, the head with a slice of rows in"
    " float64; or of the whole model, if it generates the text"
)


def estimate_seconds(checkpoint: Checkpoint, config: ConvertConfig) -> float:
    """Seconds of a conversion of a checkpoint whose headers are known.

    Raises:
        ConfigError, UnsupportedModelError: the options do not fit the model.
    """
    spec = resolve(checkpoint.config)
    after = output_sizes(
        spec, config, source_dtype(checkpoint, f"{spec.architecture.embedding}.weight")
    )
    return seconds(
        spec, config, measure(spec, header_table(checkpoint, spec.source_tensors())), after
    )


def memory_bytes(spec: ModelSpec, config: ConvertConfig, before: Sizes, after: Sizes) -> int:
    """Peak resident bytes of a conversion from sizes ``before`` to sizes ``after``."""
    weights = _layer_weights(spec)
    tokens = config.calib_samples * config.calib_seqlen if config.needs_calibration else 0
    experts = max(1, spec.experts)
    sample = (
        4 * 4 * min(tokens, SAMPLE_TOKENS) * spec.intermediate * experts
        if config.scales != "none"
        else 0
    )
    chunk = min(tokens, max(CHUNK_TOKENS, config.calib_seqlen))
    hidden = 4 * tokens * spec.hidden
    running = (
        (2 + 2 + 4) * sum(weights) + 4 * chunk * (4 * spec.intermediate + 10 * spec.hidden) + sample
    )
    # The source's layer, the next one, the float64 one, and what a rotation holds of its largest
    # linear beside it: with signs, after each of two factors, transposed. Then what is stored.
    folding = (2 + 2 + 8) * sum(weights) + 4 * 8 * max(weights) + after.linears // spec.layers
    if config.keep_8bit:
        # The weights of a group of linears, rounded and as they were: all experts are one group.
        running += 4 * sum(weights)
    if config.rounding != "rtn":
        copies = 2 if config.rounding == "gptaq" else 1
        # The second hidden states; H and what factorising it takes, in float64, and C and its
        # solution.
        hidden *= 1 + copies
        # Of a layer with experts, an H (and a C) of each, and what those of a token read.
        matrices = (9 if config.rounding == "gptaq" else 6) + copies * (experts - 1)
        read = 4 * copies * chunk * spec.config.num_experts_per_tok if spec.experts else 0
        widest = max(spec.intermediate, spec.hidden)
        running += 4 * sum(weights) + 8 * matrices * widest**2 + read * widest
    head = (before.lm_head or before.embedding) + after.lm_head + 5 * 8 * HEAD_ROWS * spec.hidden
    # A tensor is in one shard, however large.
    shard = min(max(config.shard_mib * MEBIBYTE, after.embedding), after.total)
    learning = learning_bytes(spec) if config.learns_rotations else 0
    converting = hidden + shard + max(running if tokens else 0, learning + folding, head)
    generating = before.total if config.needs_calibration and config.calib == GENERATED else 0
    resident_now = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    # What the allocator cannot use again, measured: up to 0.6 of it without calibration on layers
    # of 17 to 63 million weights, up to 0.72 in 14 conversions with calibration on layers of 2
    # million.
    return resident_now + max(converting, generating) * 2


def seconds(spec: ModelSpec, config: ConvertConfig, before: Sizes, after: Sizes) -> float:
    """Seconds of a conversion from sizes ``before`` to sizes ``after``, by rates measured now."""
    weights = spec.layers * sum(_layer_weights(spec))
    head = spec.vocab * spec.hidden
    # A token meets only the experts it is routed to.
    chosen = spec.config.num_experts_per_tok if spec.experts else 0
    idle = 3 * spec.layers * (spec.experts - chosen) * spec.intermediate * spec.hidden
    per_token = (
        2 * (weights - idle) + 4 * config.calib_seqlen * spec.heads * spec.head_dim * spec.layers
    )
    tokens = config.calib_samples * config.calib_seqlen if config.needs_calibration else 0
    probe = min(config.calib_samples, PROBE_SAMPLES) * config.calib_seqlen
    down = 2 * spec.layers * spec.intermediate * spec.hidden
    folds, flop, passes = 1, 0.0, 0.0
    if config.needs_calibration and config.calib == GENERATED:
        # A token at a time, the weights are read from memory for each.
        passes += 4
    if config.scales != "none":
        passes += 1
        trials = {
            "search": searched_candidates(),
            "learned": searched_candidates() + 3 * STEPS,
        }.get(config.scales, 2)
        sampled = (
            spec.experts * min(tokens * chosen // spec.experts, SAMPLE_TOKENS)
            if spec.experts
            else min(tokens, SAMPLE_TOKENS)
        )
        flop += trials * sampled * down
    if smooths_anew(spec, config):
        flop += min(config.calib_samples, SAMPLE_SEQUENCES) * config.calib_seqlen * per_token
    if config.needs_probe:
        folds += 1
        flop += (6 if config.keep_8bit else 2) * probe * per_token
    if config.sign_seeds > 1:
        folds += config.sign_seeds
        flop += config.sign_seeds * HELD_OUT_SAMPLES * config.calib_seqlen * (per_token + 2 * head)
    if config.learns_rotations:
        folds += 1
        flop += learning_flop(spec, config.rotation_steps)
        flop += min(config.calib_samples, SAMPLE_SEQUENCES) * config.calib_seqlen * per_token
    if config.rounding != "rtn":
        # A layer runs once, its gate and up once more; then H, and rounding. Asymmetric calibration
        # has two of each.
        copies = 2 if config.rounding == "gptaq" else 1
        inputs = sum(
            shape[1] ** 2
            for shape in {spec.linear_shape(linear) for linear in spec.architecture.linears}
        )
        passes += 1.5 * copies
        flop += copies * spec.layers * tokens * 2 * inputs * max(1, chosen)
        # An H of each expert is factorised and inverted.
        flop += 2 * spec.layers * spec.experts * (spec.hidden**3 + spec.intermediate**3) / 3
        folds += 1
    # An output tensor is in its layer's file first, which is hashed again when it is read, and then
    # in a shard.
    hashed = before.total + 3 * after.total
    total = folds * (weights + head) / _weights_per_second() + hashed / _hashed_bytes_per_second()
    return round(total + (flop + passes * tokens * per_token) / _flop_per_second(), 1)


def _layer_weights(spec: ModelSpec) -> list[int]:
    return [math.prod(spec.linear_shape(linear)) for linear in spec.architecture.linears]


@cache
def _flop_per_second() -> float:
    order = 1024
    a = torch.ones(order, order)
    return 2 * order**3 / _fastest(lambda: a @ a)


@cache
def _weights_per_second() -> float:
    # Beyond the caches, as the weights of a large layer are.
    sample = torch.linspace(-1, 1, 1024 * 4096).bfloat16().reshape(1024, 4096)

    def fold_and_quantize() -> None:
        """What is done to a weight that is rotated on both sides."""
        folded = hadamard(hadamard(sample.double() * 1.5, 4096).T.contiguous(), 1024).T.contiguous()
        store(
            [(folded, quantize_rtn(folded, WeightScheme()))], folded.shape, WeightScheme(), "sample"
        )

    return sample.numel() / _fastest(fold_and_quantize)


@cache
def _hashed_bytes_per_second() -> float:
    data = bytes(1 << 24)
    return len(data) / _fastest(lambda: hashlib.sha256(data))


def _fastest(work: Callable[[], object]) -> float:
    """Seconds of the fastest of three runs after a warm-up."""
    work()
    times = []
    for _ in range(3):
        started = time.perf_counter()
        work()
        times.append(time.perf_counter() - started)
    return min(times)
