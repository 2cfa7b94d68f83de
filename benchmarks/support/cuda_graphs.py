# SPDX-License-Identifier: Apache-2.0
"""Calls on a GPU as vLLM runs them, in CUDA graphs, and the clock that times them."""

import math
from collections.abc import Callable

import torch

LEAST_CALLS, LEAST_SECONDS = 16, 1e-3
"""A CUDA graph holds calls until there are as many or they take as long, so that its launch is
not what is timed."""


class CudaClock:
    """Seconds of device time: an event is recorded on the current stream and waited for."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.last = self._event()

    def __call__(self) -> float:
        """Seconds since the clock was made. Elapsed times are short and summed here: torch gives
        them as float32."""
        now = self._event()
        self.seconds += self.last.elapsed_time(now) / 1e3
        self.last = now
        return self.seconds

    @staticmethod
    def _event() -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        event.synchronize()
        return event


def capture(call: Callable[[], object], times: int) -> torch.cuda.CUDAGraph:
    """``times`` calls as a CUDA graph, which is how vLLM runs them: the host's part of a launch
    is not timed."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(times):
            call()
    return graph


def graph_calls(period: int, seconds: float) -> int:
    """Calls of a graph: whole rounds through the weights, until :data:`LEAST_CALLS` or
    :data:`LEAST_SECONDS`.

    Args:
        period: calls of a round.
        seconds: of a call.
    """
    wanted = min(LEAST_CALLS, math.ceil(LEAST_SECONDS / max(seconds, 1e-7)))
    return period * -(-wanted // period)
