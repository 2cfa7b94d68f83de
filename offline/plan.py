# SPDX-License-Identifier: Apache-2.0
"""What a conversion would do, from the configuration and the headers alone."""

import hashlib
import math
import resource
import time
from collections.abc import Callable

import torch
from pydantic import BaseModel, ConfigDict

from smoothrot_offline.architectures import ModelSpec, resolve
from smoothrot_offline.calibrate import CHUNK_TOKENS, check_seqlen
from smoothrot_offline.calibration_data import GENERATED
from smoothrot_offline.checkpoint import Checkpoint, check_source, source_dtype
from smoothrot_offline.config import MEBIBYTE, ConvertConfig, check_shards, make_schema
from smoothrot_offline.convert import HEAD_ROWS
from smoothrot_offline.quantize import quantize_rtn
from smoothrot_offline.rotate import hadamard
from smoothrot_offline.sizes import Sizes, header_table, measure, output_sizes
from smoothrot_vllm.errors import SmoothRotError
from smoothrot_vllm.format import QuantizationSchema, WeightScheme, check_tensor_parallel
from smoothrot_vllm.hadamard import choose_block

TP_SIZES = (1, 2, 4, 8, 16)

TIME_METHOD = (
    "calibration FLOP over the rate of a float32 matrix product, weights over the rate of folding and quantising a sample, "
    "bytes over the rate of SHA-256, all three measured for a moment on this machine now"
)
MEMORY_METHOD = (
    "this process now, plus five quarters of: the calibration's hidden states, one shard, and the largest of a decoder layer run "
    "in float32, the same layer folded in float64, the head with a slice of rows in float64; or of the whole model, if it "
    "generates the text"
)


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class HadamardPlan(_Record):
    """One rotation: its width, the block it is made of, and that block's factorisation."""

    size: int
    block: int
    factors: str


class TensorParallelPlan(_Record):
    """One tensor-parallel size: None if the output serves it, else why not."""

    size: int
    refused: str | None


class Plan(_Record):
    """The whole plan; what follows a refusal that comes first is None."""

    model: str
    refusals: list[str]
    architecture: str | None = None
    layers: int | None = None
    source_bytes: Sizes | None = None
    output_bytes: Sizes | None = None
    ratio_total: float | None = None
    ratio_linears: float | None = None
    hadamard: dict[str, HadamardPlan] | None = None
    tensor_parallel: list[TensorParallelPlan] | None = None
    memory_bytes: int | None = None
    memory_method: str = MEMORY_METHOD
    seconds: float | None = None
    time_method: str = TIME_METHOD


def plan_conversion(checkpoint: Checkpoint, config: ConvertConfig) -> Plan:
    """Plan a conversion of what :func:`~smoothrot_offline.checkpoint.open_headers` found; no weight is read.

    Whatever makes ``run`` refuse before it reads a weight is in ``refusals``.
    """
    model = str(checkpoint.path)
    try:
        spec = resolve(checkpoint.config)
        head = [f"{spec.architecture.lm_head}.weight"] if spec.tied else []
        check_source(checkpoint, spec.source_tensors(), ignorable=head)
    except SmoothRotError as error:
        return Plan(model=model, refusals=[str(error)])
    before = measure(spec, header_table(checkpoint, spec.source_tensors()))
    known = {"model": model, "architecture": spec.architecture.class_name, "layers": spec.layers, "source_bytes": before}
    try:
        schema = make_schema(spec, config)
        if config.needs_calibration:
            check_seqlen(spec, config.calib_seqlen)
    except SmoothRotError as error:
        return Plan(**known, refusals=[str(error)])
    after = output_sizes(spec, config, source_dtype(checkpoint, f"{spec.architecture.embedding}.weight"))
    return Plan(
        **known,
        refusals=[],
        output_bytes=after,
        ratio_total=before.total / after.total,
        ratio_linears=before.linears / after.linears,
        hadamard=_hadamards(spec, config) if config.rotate else {},
        tensor_parallel=[TensorParallelPlan(size=size, refused=_tp_refusal(spec, schema, size)) for size in TP_SIZES],
        memory_bytes=_memory(spec, config, before, after),
        seconds=_seconds(spec, config, before, after),
    )


def _hadamards(spec: ModelSpec, config: ConvertConfig) -> dict[str, HadamardPlan]:
    r1 = "R1" if spec.architecture.rotates_residual else "R1 online"
    widths = {r1: (spec.hidden, 1), "R2": (spec.head_dim, 1), "R4": (spec.intermediate, config.max_tp)}
    blocks = {name: choose_block(size, shards) for name, (size, shards) in widths.items()}
    return {
        name: HadamardPlan(size=widths[name][0], block=factors.size, factors=str(factors)) for name, factors in blocks.items()
    }


def _tp_refusal(spec: ModelSpec, schema: QuantizationSchema, size: int) -> str | None:
    """Why the output cannot be served at this size: by its own format, or by how vLLM splits attention."""
    try:
        check_tensor_parallel(schema, size)
        check_shards(spec, schema, size)
    except SmoothRotError as error:
        return str(error)
    if spec.heads % size:
        return f"vLLM splits {spec.heads} attention heads only over a divisor of {spec.heads}"
    if spec.kv_heads % size and size % spec.kv_heads:
        return f"vLLM neither splits nor repeats {spec.kv_heads} key-value heads over {size}"
    return None


def _layer_weights(spec: ModelSpec) -> list[int]:
    return [math.prod(spec.linear_shape(linear)) for linear in spec.architecture.linears]


def _memory(spec: ModelSpec, config: ConvertConfig, before: Sizes, after: Sizes) -> int:
    weights = _layer_weights(spec)
    tokens = config.calib_samples * config.calib_seqlen if config.needs_calibration else 0
    chunk = max(CHUNK_TOKENS, config.calib_seqlen) if config.needs_calibration else 0
    hidden = 4 * tokens * spec.hidden
    running = (2 + 4) * sum(weights) + 4 * chunk * (4 * spec.intermediate + 10 * spec.hidden)
    # The float64 layer, and a rotation's input, output and transpose of its largest linear.
    folding = (2 + 8) * sum(weights) + 3 * 8 * max(weights)
    if config.rounding != "rtn":
        # The second hidden states; H and what factorising it takes, in float64, and C and its solution.
        hidden *= 3 if config.rounding == "gptaq" else 2
        matrices = 9 if config.rounding == "gptaq" else 6
        running += 4 * sum(weights) + 8 * matrices * max(spec.intermediate, spec.hidden) ** 2
    head = before.embedding + after.lm_head + 4 * 8 * HEAD_ROWS * spec.hidden
    shard = min(config.shard_mib * MEBIBYTE, after.total)
    converting = hidden + shard + max(running if tokens else 0, folding, head)
    generating = before.total if config.needs_calibration and config.calib == GENERATED else 0
    resident_now = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    # Measured on SmolLM2-135M: the allocator, the tokenizer and the kernels keep about a quarter on top.
    return resident_now + max(converting, generating) * 5 // 4


def _seconds(spec: ModelSpec, config: ConvertConfig, before: Sizes, after: Sizes) -> float:
    weights = spec.layers * sum(_layer_weights(spec))
    head = spec.vocab * spec.hidden
    seconds = (weights + head) / _weights_per_second()
    seconds += (before.total + after.total) / _hashed_bytes_per_second()
    if config.needs_calibration:
        tokens = config.calib_samples * config.calib_seqlen
        attention = 4 * config.calib_seqlen * spec.heads * spec.head_dim * spec.layers
        passes = int(config.calib == GENERATED) + int(config.scales != "none")
        if config.rounding != "rtn":
            # Each of four groups of linears runs the layer up to itself, then the layer is run once more; then H, and rounding.
            passes += 6 if config.rounding == "gptaq" else 3
            inputs = sum(shape[1] ** 2 for shape in {spec.linear_shape(linear) for linear in spec.architecture.linears})
            seconds += spec.layers * tokens * 2 * inputs / _flop_per_second()
            seconds += weights / _weights_per_second()
        seconds += passes * tokens * (2 * weights + attention) / _flop_per_second()
    return round(seconds, 1)


def _flop_per_second() -> float:
    order = 1024
    a = torch.ones(order, order)
    return 2 * order**3 / _fastest(lambda: a @ a)


def _weights_per_second() -> float:
    sample = torch.linspace(-1, 1, 256 * 2048, dtype=torch.float64).reshape(256, 2048)

    def fold_and_quantize() -> None:
        quantize_rtn(hadamard(sample, 2048), WeightScheme())

    return sample.numel() / _fastest(fold_and_quantize)


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
