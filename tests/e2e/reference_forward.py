# SPDX-License-Identifier: Apache-2.0
"""The reference forward pass of a converted checkpoint, unsharded or as tensor-parallel ranks
would compute it."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import nn

from smoothrot_offline.report.model import QuantizedLinear, load_model
from smoothrot_offline.source.experts import Router, SparseMoe
from smoothrot_vllm import reference

ROW_PARALLEL = ("o_proj", "down_proj", "w2")
# The served forward and the reference give the same float32 numbers, save where another order of
# summation moves an activation across a rounding tie: its code then differs by one, which in these
# small models is worth up to 0.2 nats at 4 bits and 0.05 at 8. Answers are compared where no 4-bit
# input comes near a tie and the chosen tokens lead by more than 8-bit ties are worth, so that they
# are not a matter of luck.
SAFE_MARGIN = 0.1
SAFE_TIE_DISTANCE = 3e-6
# A router's choice must not hang on what an 8-bit tie is worth either.
SAFE_ROUTING_MARGIN = 0.01
STARTS = [
    "The quick brown fox",
    "def main():",
    "0123456789",
    "Rotation",
    "SELECT * FROM t",
    "Привет",
]
"""Beginnings of prompts."""


class ShardedLinear(nn.Module):
    """A row-parallel linear: each rank quantizes its own part of the input with its own scales."""

    def __init__(self, linear: QuantizedLinear, ranks: int) -> None:
        super().__init__()
        self.linear, self.ranks = linear, ranks

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        acts, bits = self.linear.scheme.activations, self.linear.scheme.weights.bits
        parts: list[torch.Tensor] = []
        for rank, tokens in enumerate(x.reshape(-1, x.shape[-1]).chunk(self.ranks, dim=1)):
            packed = self.linear.weight_packed.chunk(self.ranks, dim=1)[rank]
            groups = self.linear.weight_group_scale
            if groups is not None:
                groups = groups.chunk(self.ranks, dim=1)[rank]
            weight = (packed, self.linear.weight_scale, groups)
            if self.linear.block:
                codes, scale = reference.hadamard_quant(
                    tokens, self.linear.block, acts.clip, acts.bits
                )
            else:
                codes, scale = reference.quant(tokens, acts.clip, acts.bits)
            # The first rank alone adds the bias.
            bias = self.linear.bias if not parts else None
            parts.append(reference.gemm(codes, scale, *weight, bias, x.dtype, acts.bits, bits))
        return torch.stack(parts).sum(dim=0).reshape(*x.shape[:-1], -1)


def tie_distance(x: torch.Tensor, linear: QuantizedLinear, ranks: int) -> float:
    """How near an input of ``linear`` comes to the middle between two codes, in code steps, 0 to
    0.5."""
    tokens = x.reshape(-1, x.shape[-1])
    if linear.block:
        tokens = reference.hadamard_transform(tokens, linear.block)
    top = reference.quant_max(linear.scheme.activations.bits)
    codes = torch.cat(
        [part / part.abs().amax(1, keepdim=True) for part in tokens.chunk(ranks, dim=1)], 1
    )
    codes = codes * (top / linear.scheme.activations.clip)
    inside = (codes > -top - 1) & (codes < top)
    return float(((codes - codes.floor())[inside] - 0.5).abs().min())


@dataclass
class Greedy:
    """A greedy continuation and how far it is from depending on the last bits of a sum.

    ``margin`` is the smallest lead of a chosen token over the runner-up, in nats; ``tie_distance``
    that of the function of this name over all 4-bit inputs; ``routing_margin`` the smallest lead of
    a chosen expert, or group of them, over another by what they are chosen by. A code of 8 bits
    that falls on the other side of a tie moves the answer little.
    """

    tokens: list[int]
    logprobs: list[float]
    margin: float
    tie_distance: float
    routing_margin: float

    @property
    def is_determined(self) -> bool:
        """Whether a server must give the same tokens."""
        safe = self.margin > SAFE_MARGIN and self.tie_distance > SAFE_TIE_DISTANCE
        return safe and self.routing_margin > SAFE_ROUTING_MARGIN


class Reference:
    """A checkpoint in plain torch, float32."""

    def __init__(self, directory: Path, ranks: int = 1) -> None:
        self.model = load_model(directory, torch.float32, kernels="reference")
        self._tie_distances: list[float] = []
        self._routing_margins: list[float] = []
        for name, module in list(self.model.named_modules()):
            if isinstance(module, SparseMoe):
                module.chooser.register_forward_hook(self._watch_routing)
            if not isinstance(module, QuantizedLinear):
                continue
            shards = ranks if name.endswith(ROW_PARALLEL) else 1
            called = ShardedLinear(module, shards) if shards > 1 else module
            self.model.set_submodule(name, called)
            if module.scheme.activations.bits == 4:
                called.register_forward_pre_hook(partial(self._watch_ties, module, shards))

    def _watch_ties(
        self, linear: QuantizedLinear, ranks: int, _: nn.Module, inputs: tuple[torch.Tensor, ...]
    ) -> None:
        self._tie_distances.append(tie_distance(inputs[0], linear, ranks))

    def _watch_routing(self, router: Router, _inputs: object, logits: torch.Tensor) -> None:
        ranked = [(router.preferences(logits), router.top_k)]
        if router.kept_groups < router.groups:
            ranked.append((router.group_preferences(logits), router.kept_groups))
        for found, chosen in ranked:
            ordered = found.sort(dim=-1, descending=True).values
            lead = ordered[:, chosen - 1] - ordered[:, chosen]
            self._routing_margins.append(float(lead.min()))

    @torch.inference_mode()
    def greedy(
        self, prompt: list[int], count: int, seen: Mapping[str, torch.Tensor] | None = None
    ) -> Greedy:
        """``count`` tokens after ``prompt``, end-of-text tokens included; ``seen`` is what the
        model is called with beside tokens."""
        tokens, logprobs, margin = list(prompt), [], float("inf")
        self._tie_distances, self._routing_margins = [0.5], [float("inf")]
        for _ in range(count):
            written = len(tokens) - len(prompt)
            beside = {
                # Of each token whether it is of an image: those that are written are not.
                name: nn.functional.pad(tensor, (0, written)) if "type_ids" in name else tensor
                for name, tensor in (seen or {}).items()
            }
            logits = self.model(torch.tensor([tokens]), **beside).logits
            (best, second), (token, _) = logits[0, -1].log_softmax(-1).topk(2)
            tokens.append(int(token))
            logprobs.append(float(best))
            margin = min(margin, float(best - second))
        return Greedy(
            tokens[len(prompt) :],
            logprobs,
            margin,
            min(self._tie_distances),
            min(self._routing_margins),
        )
