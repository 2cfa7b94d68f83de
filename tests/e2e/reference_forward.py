# SPDX-License-Identifier: Apache-2.0
"""The reference forward pass of a converted checkpoint, unsharded or as tensor-parallel ranks would compute it."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from smoothrot_offline.model import QuantizedLinear, load_model
from smoothrot_vllm import reference

ROW_PARALLEL = ("o_proj", "down_proj")


class ShardedLinear(nn.Module):
    """A row-parallel linear: each rank quantises its own part of the input with its own scales, the sum is exact."""

    def __init__(self, linear: QuantizedLinear, ranks: int) -> None:
        super().__init__()
        assert linear.bias is None
        self.linear, self.ranks = linear, ranks

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        acts, bits = self.linear.scheme.activations, self.linear.scheme.weights.bits
        parts = []
        for rank, tokens in enumerate(x.reshape(-1, x.shape[-1]).chunk(self.ranks, dim=1)):
            packed = self.linear.weight_packed.chunk(self.ranks, dim=1)[rank]
            scales = self.linear.weight_scale
            scales = scales if scales.shape[1] == 1 else scales.chunk(self.ranks, dim=1)[rank]
            if self.linear.block:
                codes, scale = reference.hadamard_quant(tokens, self.linear.block, acts.clip, acts.bits)
            else:
                codes, scale = reference.quant(tokens, acts.clip, acts.bits)
            parts.append(reference.gemm(codes, scale, packed, scales, None, x.dtype, acts.bits, bits))
        return torch.stack(parts).sum(dim=0).reshape(*x.shape[:-1], -1)


@dataclass
class Greedy:
    """A greedy continuation, its log-probabilities, and the smallest lead of a chosen token over the runner-up, in nats."""

    tokens: list[int]
    logprobs: list[float]
    margin: float


class Reference:
    """A checkpoint in plain torch, float32."""

    def __init__(self, directory: Path, ranks: int = 1) -> None:
        self.model = load_model(directory, torch.float32, kernels="reference")
        for name, module in list(self.model.named_modules()):
            if ranks > 1 and name.endswith(ROW_PARALLEL):
                parent, _, child = name.rpartition(".")
                setattr(self.model.get_submodule(parent), child, ShardedLinear(module, ranks))

    @torch.inference_mode()
    def greedy(self, prompt: list[int], count: int) -> Greedy:
        """``count`` tokens after ``prompt``, end-of-text tokens included."""
        tokens, logprobs, margin = list(prompt), [], float("inf")
        for _ in range(count):
            (best, second), (token, _) = self.model(torch.tensor([tokens])).logits[0, -1].log_softmax(-1).topk(2)
            tokens.append(int(token))
            logprobs.append(float(best))
            margin = min(margin, float(best - second))
        return Greedy(tokens[len(prompt) :], logprobs, margin)
