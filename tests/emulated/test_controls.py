# SPDX-License-Identifier: Apache-2.0
"""The emulator sees what it is there to see: kernels without one of their barriers, or with too
weak a wait, fail."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from emulator import Emulator

from smoothrot_vllm import reference
from smoothrot_vllm.grouped_experts import Route

Run = Callable[[Emulator], torch.Tensor]


def quantize(tokens: int, inputs: int, **options: Any) -> tuple[Run, torch.Tensor]:
    x = torch.randn(tokens, inputs)
    block, producer = options.get("block", 0), options.get("producer", "")
    if producer == "rms_norm":
        expected = reference.rms_norm_quant(x, None, 1e-6, 1.0, 4)[0]
        options["epsilon"] = 1e-6
    elif block:
        expected = reference.hadamard_quant(x, block, 1.0, 4)[0]
    else:
        expected = reference.quant(x, 1.0, 4)[0]
    return lambda emulator: emulator.quant(x, 1.0, 4, **options)[0], expected


def group_scales(*shape: int) -> torch.Tensor:
    return torch.randint(1, 16, shape, dtype=torch.uint8)


def multiply(
    kernel: str, tokens: int, outputs: int, inputs: int, group: int | None = None
) -> tuple[Run, torch.Tensor]:
    codes = reference.pack_int4(torch.randint(-8, 8, (tokens, inputs), dtype=torch.int8))
    weight = reference.pack_int4(torch.randint(-8, 8, (outputs, inputs), dtype=torch.int8))
    scale, weight_scale = torch.rand(tokens), torch.rand(outputs, 1)
    group_scale = None if group is None else group_scales(outputs, inputs // group)
    expected = reference.gemm(
        codes, scale, weight, weight_scale, group_scale, None, torch.float32, 4, 4
    )
    arguments = (codes, scale, weight, weight_scale, torch.float32)
    return lambda emulator: emulator.gemm(kernel, *arguments, group_scale=group_scale), expected


def multiply_experts(counts: list[int], outputs: int, inputs: int) -> tuple[Run, torch.Tensor]:
    chosen = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    codes = reference.pack_int4(torch.randint(-8, 8, (len(chosen), inputs), dtype=torch.int8))
    weight = reference.pack_int4(
        torch.randint(-8, 8, (len(counts), outputs, inputs), dtype=torch.int8)
    )
    scale, weight_scale = torch.rand(len(chosen)), torch.rand(len(counts), outputs, 1)
    group_scale = group_scales(len(counts), outputs, inputs // 32)
    parts = zip(
        *(codes.split(counts), scale.split(counts), weight, weight_scale, group_scale), strict=True
    )
    expected = torch.cat([reference.gemm(*part, None, torch.float32, 4, 4) for part in parts])
    tiles = Route.of(chosen[:, None], len(counts)).tiles
    arguments = (codes, scale, weight, weight_scale, torch.float32)
    return (
        lambda emulator: emulator.gemm("experts", *arguments, tiles=tiles, group_scale=group_scale),
        expected,
    )


CASES: dict[str, Callable[[], tuple[Run, torch.Tensor]]] = {
    "quant": lambda: quantize(1, 1024),
    "rms_norm_quant": lambda: quantize(1, 4096, producer="rms_norm"),
    "hadamard_quant, power of two": lambda: quantize(1, 2048, block=2048),
    "hadamard_quant, base, several rows a block": lambda: quantize(17, 768, block=768),
    "gemm_small": lambda: multiply("small", 3, 64, 1024),
    "gemm_small, groups": lambda: multiply("small", 3, 64, 1024, 64),
    "gemm_s8": lambda: multiply("s8", 20, 70, 640),
    "gemm_s8, groups": lambda: multiply("s8", 20, 70, 640, 32),
    "gemm_experts": lambda: multiply_experts([20, 0, 3], 70, 640),
}


def survives(emulator: Emulator, run: Run, expected: torch.Tensor, **options: int) -> bool:
    """Whether the result is right in both orders of threads in spite of ``options``."""
    for order in (0, 1):
        with emulator.options(reverse_order=order, **options):
            if not torch.equal(run(emulator), expected):
                return False
    return True


@pytest.mark.parametrize("case", CASES)
def test_every_barrier_is_missed_when_it_is_gone(emulator_int4: Emulator, case: str) -> None:
    run, expected = CASES[case]()
    with emulator_int4.options():
        run(emulator_int4)
        barriers = emulator_int4.counters().barriers
    assert barriers >= 1
    assert survives(emulator_int4, run, expected)
    needless = [
        i for i in range(barriers) if survives(emulator_int4, run, expected, dropped_barrier=i)
    ]
    assert needless == []


@pytest.mark.parametrize("case", ["gemm_s8", "gemm_s8, groups", "gemm_experts"])
def test_a_wait_that_lets_one_more_copy_stay_pending_is_seen(
    emulator_int4: Emulator, case: str
) -> None:
    run, expected = CASES[case]()
    assert not survives(emulator_int4, run, expected, wait_slack=1)
