# SPDX-License-Identifier: Apache-2.0
"""A GPU as kernels.py and decode.py time it, and the CPU in its place for a rehearsal of either."""

import math
import re
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from common import Clock, Floors, Timing, machine, time_alternately
from gpu_ready import require
from peers_cuda import find_peers

from smoothrot_vllm import ops

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


class CudaDevice:
    """The current GPU."""

    activation_bytes = 2
    probe_bytes = 1 << 30
    probe_size = 8192
    new_clock: Callable[[], Clock] = CudaClock

    def __init__(self) -> None:
        self.properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        self.capability = 10 * self.properties.major + self.properties.minor
        self.name = re.sub(r"[^a-z0-9]+", "-", self.properties.name.lower()).strip("-")
        self.cache_bytes = 2 * self.properties.L2_cache_size
        self.peers = find_peers()

    def facts(self) -> dict[str, Any]:
        """Name, capability, memory, driver's CUDA and what our library was built for."""
        return {
            "gpu": self.properties.name,
            "capability": f"sm_{self.capability}",
            "multiprocessors": self.properties.multi_processor_count,
            "memory_bytes": self.properties.total_memory,
            "l2_bytes": self.properties.L2_cache_size,
            "cuda": torch.version.cuda,
            "architectures": list(ops.cuda_architectures()),
            "clock": "CUDA events around CUDA graphs",
        }

    def reader(self, memory: Sequence[torch.Tensor]) -> None:
        """None: a GPU's bandwidth is its own, so that of :meth:`floors` holds for the whole run."""

    def graph(self, call: Callable[[], object], times: int) -> Callable[[], object]:
        """``times`` calls as one."""
        return capture(call, times).replay

    def floors(self) -> Floors:
        """Bytes/s of a copy within device memory, read and written, and int8 multiply-adds/s of
        torch's own matmul.

        Twice the int8 rate stands for int4 where the GPU multiplies it natively: nothing in torch
        measures that.
        """
        source = torch.empty(self.probe_bytes, dtype=torch.uint8)
        target = torch.empty_like(source)
        left, right = (
            torch.randint(-128, 128, (self.probe_size, self.probe_size), dtype=torch.int8)
            for _ in range(2)
        )
        probes: dict[str, Callable[[], object]] = {
            "copy": partial(target.copy_, source),
            "multiply": partial(torch._int_mm, left, right.t()),
        }
        times = time_alternately(probes, 15, 0.02, self.new_clock())
        rate = self.probe_size**3 / times["multiply"].best
        return Floors(
            2 * self.probe_bytes / times["copy"].best,
            rate,
            2 * rate if self.capability < 90 else None,
        )

    def time(
        self, calls: Mapping[str, tuple[Callable[[], object], int]], rounds: int, seconds: float
    ) -> dict[str, Timing]:
        """Alternately, each as a CUDA graph of whole rounds through its weights; peers that
        cannot be captured are noted."""
        clock = self.new_clock()
        graphs, counts = {}, {}
        for name, (call, period) in calls.items():
            call()  # compiles or allocates what it has to
            start = clock()
            call()
            counts[name] = graph_calls(period, clock() - start)
            try:
                graphs[name] = self.graph(call, counts[name])
            except Exception as error:
                if name not in self.peers.makers:
                    raise
                self.peers.note(name, "as a CUDA graph", error)
        times = time_alternately(graphs, rounds, seconds, clock)
        return {
            name: Timing(time.median / counts[name], time.best / counts[name])
            for name, time in times.items()
        }


class Rehearsal(CudaDevice):
    """The CPU in a GPU's place: the same code on a wall clock, calls one after the other instead of
    graphs.

    What it finds says nothing of any GPU.
    """

    name = "rehearsal"
    cache_bytes = 1 << 16
    probe_bytes = 1 << 16
    probe_size = 64
    capability = 90
    new_clock = staticmethod(lambda: time.perf_counter)

    def __init__(self) -> None:
        self.peers = find_peers()

    def facts(self) -> dict[str, Any]:
        """Those of the CPU."""
        return machine() | {
            "rehearsal": (
                "on the CPU, in tiny shapes unless others are named: no figure here is of a GPU"
            )
        }

    def graph(self, call: Callable[[], object], times: int) -> Callable[[], object]:
        """``times`` calls, one after the other."""

        def replay() -> None:
            for _ in range(times):
                call()

        return replay


def open_rehearsal() -> Rehearsal:
    """The CPU, on one thread: what is tiny is only held up by more."""
    torch.set_num_threads(1)
    return Rehearsal()


def open_cuda(what: str) -> CudaDevice:
    """The current GPU, made torch's default device; exits with 2 and the reason where ``what``
    cannot run on one."""
    require(what)
    torch.set_default_device("cuda")
    return CudaDevice()
