# SPDX-License-Identifier: Apache-2.0
"""Fused producers for kernels.py: ops that quantise what another op would have written to memory
first."""

import argparse
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import product
from typing import Any, Protocol

import torch
from contenders import CLIP, Device

from smoothrot_vllm import ops

EPSILON = 1e-6


class Allowance(Protocol):
    """Says whether there is time for another case."""

    def allows(self, case: str) -> bool:
        """Whether to begin ``case``."""


def vllm_norm() -> Callable[..., None] | None:
    """vLLM's fused addition and RMS norm for the device, or None where vLLM is missing or built
    for another."""
    try:
        from vllm.platforms import current_platform
    except ImportError:
        return None
    if current_platform.device_type != torch.get_default_device().type:
        return None
    current_platform.import_kernels()
    return getattr(torch.ops._C, "fused_add_rms_norm", None)


def bench_producers(
    args: argparse.Namespace,
    device: Device,
    schedule: Allowance,
    widths: Sequence[int],
    norm_widths: Sequence[int],
) -> Iterator[dict[str, Any]]:
    """Each fused op beside the separate op followed by the plain quantisation.

    Args:
        args, device, schedule: of kernels.py.
        widths: inputs of down_proj.
        norm_widths: inputs of the linears that read a norm.
    """
    for inputs, tokens in product(widths, args.tokens):
        if schedule.allows(f"silu_mul_hadamard_quant of {inputs}, {tokens} tokens"):
            gate_up = torch.randn(tokens, 2 * inputs, dtype=torch.bfloat16)
            fused = partial(ops.silu_mul_hadamard_quant, gate_up, inputs, CLIP, 8)
            yield _timed(
                "silu_mul_hadamard_quant",
                inputs,
                tokens,
                fused,
                partial(_silu_mul_then_quant, gate_up),
                args,
                device,
            )
    norm = vllm_norm()
    if norm is None:
        device.peers.missing["rms_norm"] = "vLLM with kernels for this device is not installed"
        return
    for inputs, tokens in product(norm_widths, args.tokens):
        if schedule.allows(f"rms_norm_quant of {inputs}, {tokens} tokens"):
            weight = torch.ones(inputs, dtype=torch.bfloat16)
            # Of zeros, so that no round of additions overflows.
            x, residual = (torch.zeros(tokens, inputs, dtype=torch.bfloat16) for _ in range(2))
            fused = partial(ops.rms_norm_quant, x, weight, EPSILON, CLIP, 8, residual)
            separate = partial(_norm_then_quant, norm, x, residual, weight)
            yield _timed("rms_norm_quant", inputs, tokens, fused, separate, args, device)


def _silu_mul_then_quant(gate_up: torch.Tensor) -> None:
    # As vLLM's SiluAndMul computes it on a CPU, outside a compiled graph.
    gate, up = gate_up.chunk(2, dim=-1)
    ops.hadamard_quant(torch.nn.functional.silu(gate) * up, up.shape[-1], CLIP, 8)


def _norm_then_quant(
    norm: Callable[..., None], x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor
) -> None:
    norm(x, residual, weight, EPSILON)
    ops.quant(x, CLIP, 8)


def _timed(
    op: str,
    inputs: int,
    tokens: int,
    fused: Callable[[], object],
    separate: Callable[[], object],
    args: argparse.Namespace,
    device: Device,
) -> dict[str, Any]:
    """One result; both are called once before, because a new rotation allocates."""
    fused()
    separate()
    times = device.time({"ours": (fused, 1), "separate": (separate, 1)}, args.rounds, args.seconds)
    medians = {f"{name}_us": round(timing.median * 1e6, 2) for name, timing in times.items()}
    return {
        "op": op,
        "inputs": inputs,
        "M": tokens,
        **medians,
        "ours_best_us": round(times["ours"].best * 1e6, 2),
    }
