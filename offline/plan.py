# SPDX-License-Identifier: Apache-2.0
"""What a conversion would do, from the configuration and the headers alone."""

import torch
from pydantic import BaseModel, ConfigDict

from smoothrot_offline.architectures import ModelSpec
from smoothrot_offline.checkpoint import Checkpoint, source_dtype
from smoothrot_offline.config import ConvertConfig, check_shards
from smoothrot_offline.device import CPU, device_name
from smoothrot_offline.estimate import MEMORY_METHOD, TIME_METHOD, memory_bytes, seconds
from smoothrot_offline.preflight import admit_model, admit_options, rotation_blocks
from smoothrot_offline.sizes import Sizes, header_table, measure, output_sizes
from smoothrot_vllm.errors import SmoothRotError
from smoothrot_vllm.format import QuantizationSchema, check_tensor_parallel

TP_SIZES = (1, 2, 4, 8, 16)


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
    """Plan a conversion of what :func:`~smoothrot_offline.checkpoint.open_headers` found.

    ``device`` is what ``run`` would compute on. Whatever makes ``run`` refuse before it begins is
    in ``refusals``, for a directory (see :func:`~smoothrot_offline.preflight.admit_model`); what it
    would say is in ``notes``.
    """
    asked = {"model": str(checkpoint.path), "device": device_name(device)}
    try:
        spec = admit_model(checkpoint)
    except SmoothRotError as error:
        return Plan(**asked, refusals=[str(error)])
    before = measure(spec, header_table(checkpoint, spec.source_tensors()))
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
        memory_bytes=memory_bytes(spec, config, before, after),
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
    if spec.kv_heads % size and size % spec.kv_heads:
        return f"vLLM neither splits nor repeats {spec.kv_heads} key-value heads over {size}"
    return None
