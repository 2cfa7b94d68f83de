# SPDX-License-Identifier: Apache-2.0
"""The experts of one layer of a mixture for layers.py, rotation and sum over experts included,
beside vLLM's 16-bit ones."""

import argparse
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from benchmarks.kernels.contenders import CLIP, Calls, Device, microseconds, vllm_ops
from benchmarks.support.random_weights import RandomWeight
from benchmarks.support.report import Schedule
from benchmarks.support.timing import Floors
from smoothrot_vllm import ops
from smoothrot_vllm.format import WeightScheme

WEIGHTS, ACT_BITS = WeightScheme(bits=4, group_size=32), 8
SCHEME = f"w{WEIGHTS.bits}a{ACT_BITS}_g{WEIGHTS.group_size}"
"""Of a mixture's experts under the presets that have groups of 32."""
BYTES_OF_A_WEIGHT = (WEIGHTS.bits + 4 / WEIGHTS.group_size) / 8
CHOICES = 64
"""Different batches, by turns, so that a token seldom finds its experts in cache."""


@dataclass(frozen=True)
class Mixture:
    """Sizes of a layer of routed experts."""

    experts: int
    top_k: int
    hidden: int
    intermediate: int

    @property
    def values(self) -> int:
        """Weights of one expert."""
        return 3 * self.hidden * self.intermediate


MIXTURES = {
    "Qwen3-30B-A3B, half of its experts": Mixture(64, 8, 2048, 768),
    "rehearsal": Mixture(4, 2, 64, 96),
}

Experts = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""Of hidden states, and of the weights and numbers of each token's experts."""


def ours(mixture: Mixture) -> Experts:
    """``ops.experts`` on random codes."""
    stacks = []
    for outputs, inputs in (
        (2 * mixture.intermediate, mixture.hidden),
        (mixture.hidden, mixture.intermediate),
    ):
        weight = RandomWeight.of(outputs, inputs, WEIGHTS, mixture.experts)
        stacks += [weight.packed(), weight.scale]
    numbers = (mixture.intermediate, CLIP, ACT_BITS, WEIGHTS.bits, WEIGHTS.group_size)
    return lambda x, weights, chosen: ops.experts(x, weights, chosen, *stacks, *numbers)


def vllm_bf16(mixture: Mixture) -> Experts:
    """vLLM's experts for CPUs without AMX, the only ones that it has for them; raises what
    ``vllm_ops`` does."""
    vllm = vllm_ops("cpu_fused_moe")
    sizes = ((2 * mixture.intermediate, mixture.hidden), (mixture.hidden, mixture.intermediate))
    w13, w2 = (
        vllm.cpu_prepack_moe_weight(torch.randn(mixture.experts, *size).bfloat16(), "vec")
        for size in sizes
    )

    def experts(x: torch.Tensor, weights: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
        out = torch.empty_like(x)
        vllm.cpu_fused_moe(out, x, w13, w2, None, None, weights, chosen, "silu", "vec")
        return out

    return experts


def bench_experts(
    args: argparse.Namespace, device: Device, floors: Floors, schedule: Schedule
) -> Iterator[dict[str, Any]]:
    """One result for each mixture that ``args.mixtures`` names and number of tokens, which choose
    their experts at random.

    The floor is that of reading the weights of the chosen experts once and of multiplying at the
    peak rate.
    """
    for name in args.mixtures:
        mixture = MIXTURES[name]
        contenders: dict[str, Experts] = {"ours": ours(mixture)}
        if device.name == "cpu":
            try:
                contenders["bf16"] = vllm_bf16(mixture)
            except (ImportError, RuntimeError) as error:
                device.peers.missing["bf16 experts"] = str(error)
        for tokens in args.tokens:
            if not schedule.allows(f"experts of {name}, {tokens} tokens"):
                continue
            x = torch.randn(tokens, mixture.hidden, dtype=torch.bfloat16)
            weights = torch.full((tokens, mixture.top_k), 1 / mixture.top_k)
            batches = [
                torch.rand(tokens, mixture.experts).topk(mixture.top_k).indices.int()
                for _ in range(CHOICES)
            ]
            calls: Calls = {}
            for contender, experts in contenders.items():
                turns = itertools.cycle(batches)
                calls[contender] = (partial(_call, experts, x, weights, turns), CHOICES)
                experts(x, weights, batches[0])  # prepares the rotation, which allocates
            times = device.time(calls, args.rounds, args.seconds)
            used = sum(len(chosen.unique()) for chosen in batches) / CHOICES
            read = used * mixture.values * BYTES_OF_A_WEIGHT / floors.read_bytes
            rate = floors.multiply_adds
            multiply = tokens * mixture.top_k * mixture.values / rate if rate else 0.0
            yield {
                "op": f"experts_{SCHEME}",
                "model": name,
                "shape": [mixture.experts, mixture.top_k, mixture.hidden, mixture.intermediate],
                "M": tokens,
                "ours_us": microseconds(times["ours"].median),
                "ours_best_us": microseconds(times["ours"].best),
                "bf16_us": microseconds(times["bf16"].median) if "bf16" in times else None,
                "floor_us": microseconds(max(read, multiply)),
            }


def _call(
    experts: Experts, x: torch.Tensor, weights: torch.Tensor, turns: Iterator[torch.Tensor]
) -> None:
    experts(x, weights, next(turns))
