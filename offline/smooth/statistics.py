# SPDX-License-Identifier: Apache-2.0
"""What a smoothing policy must know of a linear's input, gathered while the calibration tokens
pass."""

import math

import torch

SAMPLE_TOKENS = 2048


class InputStatistics:
    """Per-channel magnitudes of a linear's input ``X (tokens, channels)``, and a sample of its
    tokens.

    ``largest`` is ``max_t |X_tj|``, float32 ``(channels,)``; ``norm`` is ``||X_j||_2``, float64
    ``(channels,)``; ``tokens`` counts what was seen. ``sample`` holds every ``stride``-th token, so
    that rare tokens (the massive one at the start of a sequence) are in it as often as in the text.

    Args:
        channels: width of the input.
        expected_tokens: how many tokens will be shown in all; some ``SAMPLE_TOKENS`` of them are
            kept.
        device: that of the tokens.
    """

    def __init__(
        self, channels: int, expected_tokens: int, device: torch.device | None = None
    ) -> None:
        self.largest = torch.zeros(channels, device=device)
        self.tokens = 0
        # An odd stride meets every position of sequences whose length is a power of two.
        self.stride = max(1, expected_tokens // SAMPLE_TOKENS) | 1
        self._squares = torch.zeros(channels, dtype=torch.float64, device=device)
        self._kept: list[torch.Tensor] = []

    def update(self, x: torch.Tensor) -> None:
        """Add the tokens of float32 ``x (tokens, channels)``."""
        self.largest = torch.maximum(self.largest, x.abs().amax(dim=0))
        self._squares += x.square().sum(dim=0, dtype=torch.float64)
        self._kept.append(x[-self.tokens % self.stride :: self.stride].clone())
        self.tokens += x.shape[0]

    @property
    def norm(self) -> torch.Tensor:
        """``||X_j||_2`` over all tokens, float64 ``(channels,)``."""
        return self._squares.sqrt()

    @property
    def sample(self) -> torch.Tensor:
        """Float32 ``(sampled tokens, channels)``."""
        return torch.cat(self._kept)

    def quantile(self, q: float) -> torch.Tensor:
        """The q-quantile of ``|X_j|`` over the sampled tokens, float32 ``(channels,)``: the
        nearest token at or above it."""
        sample = self.sample
        return sample.abs().kthvalue(max(1, math.ceil(q * len(sample))), dim=0).values

    def sampled(self, rows: torch.Tensor) -> torch.Tensor:
        """Those rows of a tensor ``(tokens, ...)`` that belong to the tokens of :attr:`sample`."""
        return rows[:: self.stride]
