# SPDX-License-Identifier: Apache-2.0
"""Fused producers for layers.py: ops that quantize what another op would have written to memory
first, each beside the separate op followed by the plain quantization."""

import argparse
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import product
from typing import Any

import torch

from benchmarks.kernels.contenders import CLIP, Device, microseconds, vllm_ops
from benchmarks.support.report import Schedule
from smoothrot_vllm import ops

EPSILON = 1e-6
Pair = tuple[Callable[[], object], Callable[[], object]]
"""The fused op, and the separate ones."""


def silu_mul(inputs: int, tokens: int) -> Pair:
    """``silu(gate) * up``, rotated and quantized. The separate activation is vLLM's on a CPU
    outside a compiled graph."""
    gate_up = torch.randn(tokens, 2 * inputs, dtype=torch.bfloat16)

    def separate() -> None:
        gate, up = gate_up.chunk(2, dim=-1)
        ops.hadamard_quant(torch.nn.functional.silu(gate) * up, inputs, CLIP, 8)

    return partial(ops.silu_mul_hadamard_quant, gate_up, inputs, CLIP, 8), separate


def rms_norm(inputs: int, tokens: int) -> Pair:
    """vLLM's addition and norm of zeros, so that no round of additions overflows; quantized."""
    weight = torch.ones(inputs, dtype=torch.bfloat16)
    x, residual = (torch.zeros(tokens, inputs, dtype=torch.bfloat16) for _ in range(2))

    def separate() -> None:
        torch.ops._C.fused_add_rms_norm(x, residual, weight, EPSILON)
        ops.quant(x, CLIP, 8)

    return partial(ops.rms_norm_quant, x, weight, EPSILON, CLIP, 8, residual), separate


def bench_producers(
    args: argparse.Namespace,
    device: Device,
    schedule: Schedule,
    widths: Sequence[int],
    norm_widths: Sequence[int],
) -> Iterator[dict[str, Any]]:
    """One row per op, width and number of tokens.

    Args:
        args, device, schedule: of layers.py.
        widths: inputs of down_proj.
        norm_widths: inputs of the linears that read a norm.
    """
    producers = {"silu_mul_hadamard_quant": (silu_mul, widths)}
    try:
        vllm_ops("fused_add_rms_norm")
        producers["rms_norm_quant"] = (rms_norm, norm_widths)
    except (ImportError, RuntimeError) as error:
        device.peers.missing["rms_norm"] = str(error)
    for op, (make, sizes) in producers.items():
        for inputs, tokens in product(sizes, args.tokens):
            if not schedule.allows(f"{op} of {inputs}, {tokens} tokens"):
                continue
            fused, separate = make(inputs, tokens)
            fused()  # a new rotation allocates
            times = device.time(
                {"ours": (fused, 1), "separate": (separate, 1)}, args.rounds, args.seconds
            )
            yield {
                "op": op,
                "inputs": inputs,
                "M": tokens,
                "ours_us": microseconds(times["ours"].median),
                "separate_us": microseconds(times["separate"].median),
                "ours_best_us": microseconds(times["ours"].best),
            }
