# SPDX-License-Identifier: Apache-2.0
"""What a conversion would do, and the memory and time it would take, from the configuration and the
headers alone."""

import hashlib
import resource
import time
from collections.abc import Callable
from functools import cache

import torch
from pydantic import BaseModel, ConfigDict

from smoothrot_offline.check.admit import admit_model, admit_options, rotation_blocks
from smoothrot_offline.check.inspect import Sizes, measure, output_sizes
from smoothrot_offline.config import ConvertConfig, check_shards, folds_residual
from smoothrot_offline.decide.policies import SAMPLE_TOKENS
from smoothrot_offline.decide.stages import STAGES, Cost
from smoothrot_offline.decide.study import PROBE_SAMPLES
from smoothrot_offline.device import CPU, device_name
from smoothrot_offline.distill.cost import distillation_bytes, distillation_flop
from smoothrot_offline.learn.fisher import gradients_bytes, moments_bytes
from smoothrot_offline.learn.learning import learning_bytes
from smoothrot_offline.rounding.rtn import HEAD_ROWS, quantize_rtn, store
from smoothrot_offline.rounding.sequential import rounding_flop
from smoothrot_offline.source.checkpoint import Checkpoint, source_dtype
from smoothrot_offline.source.family import ModelSpec
from smoothrot_offline.source.layers import CHUNK_TOKENS
from smoothrot_offline.source.resolve import resolve
from smoothrot_offline.source.text import GENERATED
from smoothrot_offline.transform.rotation import hadamard
from smoothrot_vllm.errors import SmoothRotError
from smoothrot_vllm.format import QuantizationSchema, WeightScheme, check_tensor_parallel

TIME_METHOD = (
    "FLOP of every pass over calibration tokens over the rate of a float32 matrix product, weights"
    " over the rate of folding and quantizing a sample on one process, bytes over the rate of"
    " SHA-256, all three measured for a moment on this machine now"
)
MEMORY_METHOD = (
    "this process now, the moments of gradients, plus twice: the calibration's hidden states, and"
    " the largest of a decoder layer run in float32, that layer with a gradient, folded in float64"
    " with the samples that rotations are learned from, or rounded, its Hessians counting once, the"
    " embedding or the head with a slice of rows in float64; or the whole model, if it generates"
    " the text"
)


def estimate_seconds(checkpoint: Checkpoint, config: ConvertConfig) -> float:
    """Seconds of a conversion of a checkpoint whose headers are known.

    Raises:
        ConfigError, UnsupportedModelError: the options do not fit the model.
    """
    spec = resolve(checkpoint.config, checkpoint.tensors)
    after = output_sizes(
        spec, config, source_dtype(checkpoint, f"{spec.architecture.embedding}.weight")
    )
    before = measure(spec, checkpoint.stored_bytes(spec.source_tensors()))
    return seconds(spec, config, before, after)


def memory_bytes(
    spec: ModelSpec, config: ConvertConfig, before: Sizes, after: Sizes, loaded: int = 2
) -> int:
    """Peak resident bytes of a conversion from sizes ``before`` to sizes ``after``, of whose source
    a weight of a layer has ``loaded`` bytes in memory."""
    weights = spec.layer_weights()
    tokens = config.calib_samples * config.calib_seqlen if config.needs_calibration else 0
    smoothed = max(sum(spec.down_widths(index)) for index in range(spec.layers))
    sample = 4 * 4 * min(tokens, SAMPLE_TOKENS) * smoothed if config.scales != "none" else 0
    chunk = min(tokens, max(CHUNK_TOKENS, config.calib_seqlen))
    activations = 4 * chunk * (4 * spec.widest + 10 * spec.hidden)
    hidden = 4 * tokens * spec.stream
    running = (2 * loaded + 4) * sum(weights) + activations + sample
    # The source's layer, the next one, the float64 one, and what a rotation holds of its largest
    # linear beside it: with signs, after each of two factors, transposed. Then what is stored.
    folding = (2 * loaded + 8) * sum(weights) + 4 * 8 * max(weights)
    folding += after.linears * sum(weights) // spec.decoder_weights()
    gradients = rounding = matrices = 0
    if config.keep_8bit:
        # The weights of a group of linears, rounded and as they were: all experts are one group.
        running += 4 * sum(weights)
    if config.keep_8bit or config.weighs_tokens:
        probe = min(tokens, PROBE_SAMPLES * config.calib_seqlen)
        differentiated = tokens if config.weighs_tokens else probe
        gradients = gradients_bytes(spec, differentiated, config.calib_seqlen, config.weighs_tokens)
    if config.rounding != "rtn":
        copies = 2 if config.asymmetric else 1
        # The second hidden states.
        hidden *= 1 + copies
        rounding = (2 * loaded + 8 + 4 * copies) * sum(weights) + activations
        matrices = _rounding_bytes(spec, chunk, config.asymmetric)
    head = (before.lm_head or before.embedding) + after.lm_head + 5 * 8 * HEAD_ROWS * spec.hidden
    embedding = before.embedding + after.embedding + 5 * 8 * HEAD_ROWS * spec.hidden
    if spec.kept:
        # What is beside a text tower or the layers is stored with the embedding.
        embedding += before.other + after.other
    if spec.draft is not None and folds_residual(spec, config):
        # fc, what it becomes and the linears that are added, in float64, and what folding them
        # takes.
        embedding += 9 * 8 * spec.hidden**2
    learning = learning_bytes(spec, config) if config.learns_rotations else 0
    running = running if tokens else 0
    stages = (gradients, running, learning + folding, rounding + matrices // 2, head, embedding)
    converting = hidden + max(stages)
    generating = before.total if config.needs_calibration and config.calib == GENERATED else 0
    resident_now = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    # What the allocator cannot use again, measured: up to 0.6 of it without calibration on layers
    # of 17 to 63 million weights, up to 0.72 in 14 conversions with calibration on layers of 2
    # million. Matrices of one size take each other's place.
    working = max(2 * max(converting, generating), distillation_bytes(spec, config))
    moments = moments_bytes(spec) if config.relates_outputs else 0
    return resident_now + moments + working


def _rounding_bytes(spec: ModelSpec, chunk: int, asymmetric: bool) -> int:
    """H and what factorizing it takes, in float64, and C and its solution; of a layer with experts
    an H (and a C) of each, and what those of a token read."""
    copies, matrices = (2, 9) if asymmetric else (1, 6)
    widest, routed = (max(width, spec.hidden) for width in (spec.widest, spec.intermediate))
    entries = matrices * widest**2 + copies * (max(1, spec.experts) - 1) * routed**2
    read = 4 * copies * chunk * spec.config.num_experts_per_tok if spec.experts else 0
    return 8 * entries + read * routed


def seconds(spec: ModelSpec, config: ConvertConfig, before: Sizes, after: Sizes) -> float:
    """Seconds of a conversion from sizes ``before`` to sizes ``after``, by rates measured now."""
    tokens = config.calib_samples * config.calib_seqlen if config.needs_calibration else 0
    costs = [stage.cost(spec, config) for stage in STAGES if stage.steps(spec, config)]
    if config.rounding != "rtn":
        asymmetric = config.asymmetric
        # A layer runs once, its gate and up once more; asymmetric calibration has two of each.
        costs.append(
            Cost(
                1,
                rounding_flop(
                    spec, tokens, asymmetric, config.weighs_tokens, config.relates_outputs
                ),
                1.5 * (2 if asymmetric else 1),
            )
        )
    costs.append(Cost(flop=distillation_flop(spec, config)))
    folds = 1 + sum(cost.folds for cost in costs)
    per_token = spec.token_flop(config.calib_seqlen)
    flop = sum(cost.flop + cost.passes * tokens * per_token for cost in costs)
    weights = spec.decoder_weights() + spec.vocab * spec.hidden
    total = folds * weights / _weights_per_second() + flop / _flop_per_second()
    hashed = before.total + after.total
    return round(total + hashed / _hashed_bytes_per_second(), 1)


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


TP_SIZES = (1, 2, 4, 8, 16)


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class HadamardPlan(_Record):
    """One rotation: its width, the block it is made of, and that block's factorization."""

    size: int
    block: int
    factors: str


class TensorParallelPlan(_Record):
    """One tensor-parallel size: None if the output serves it, else why not."""

    size: int
    refused: str | None


class Plan(_Record):
    """The whole plan; what follows a refusal that comes first is None. Memory and time are those
    of a conversion on the CPU."""

    model: str
    device: str
    refusals: list[str]
    notes: list[str] = []
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


def plan_conversion(
    checkpoint: Checkpoint, config: ConvertConfig, device: torch.device = CPU
) -> Plan:
    """Plan a conversion of what :func:`~smoothrot_offline.source.checkpoint.open_headers` found.

    ``device`` is what ``run`` would compute on. Whatever makes ``run`` refuse before it begins is
    in ``refusals``, for a directory (see :func:`~smoothrot_offline.check.admit.admit_model`); what
    it would say is in ``notes``.
    """
    asked = {"model": str(checkpoint.path), "device": device_name(device)}
    try:
        spec = admit_model(checkpoint)
    except SmoothRotError as error:
        return Plan(**asked, refusals=[str(error)])
    before = measure(spec, checkpoint.stored_bytes(spec.source_tensors()))
    known = asked | {
        "architecture": spec.architecture.class_name,
        "layers": spec.layers,
        "source_bytes": before,
    }
    try:
        admitted = admit_options(checkpoint, spec, config)
    except SmoothRotError as error:
        return Plan(**known, refusals=[str(error)])
    after = output_sizes(
        spec, config, source_dtype(checkpoint, f"{spec.architecture.embedding}.weight")
    )
    return Plan(
        **known,
        refusals=[],
        notes=admitted.notes,
        output_bytes=after,
        ratio_total=before.total / after.total,
        ratio_linears=before.linears / after.linears,
        hadamard=_hadamards(spec, config) if config.rotate else {},
        tensor_parallel=[
            TensorParallelPlan(size=size, refused=_tp_refusal(spec, admitted.schema, size))
            for size in TP_SIZES
        ],
        memory_bytes=memory_bytes(
            spec, config, before, after, loaded=2 if checkpoint.packing is None else 4
        ),
        seconds=seconds(spec, config, before, after),
    )


def _hadamards(spec: ModelSpec, config: ConvertConfig) -> dict[str, HadamardPlan]:
    return {
        name: HadamardPlan(size=size, block=factors.size, factors=str(factors))
        for name, (size, factors) in rotation_blocks(spec, config).items()
    }


def _tp_refusal(spec: ModelSpec, schema: QuantizationSchema, size: int) -> str | None:
    """Why the output cannot be served at this size: by its own format, or by how vLLM splits
    attention."""
    try:
        check_tensor_parallel(schema, size)
        check_shards(spec, schema, size)
    except SmoothRotError as error:
        return str(error)
    if spec.heads % size:
        return f"vLLM splits {spec.heads} attention heads only over a divisor of {spec.heads}"
    for table in spec.tables:
        if (keys := table.linear_attention) is not None:
            for key in (keys.key_heads, keys.value_heads):
                if (heads := getattr(spec.config, key)) % size:
                    return f"vLLM splits {key} {heads} only over a divisor of {heads}"
    for kv_heads, _ in map(spec.head_sizes, spec.tables):
        if kv_heads % size and size % kv_heads:
            return f"vLLM neither splits nor repeats {kv_heads} key-value heads over {size}"
    return None
