# SPDX-License-Identifier: Apache-2.0
"""A GPU as layers.py and decode.py time it, and the CPU in its place for a rehearsal of either."""

import re
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from benchmarks.kernels.contenders import Calls
from benchmarks.kernels.cuda_peers import find_peers
from benchmarks.support.cuda_graphs import CudaClock, capture, graph_calls
from benchmarks.support.gpu_ready import require
from benchmarks.support.machine import machine
from benchmarks.support.timing import Clock, Floors, Timing, time_alternately
from smoothrot_vllm import ops


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

    def time(self, calls: Calls, rounds: int, seconds: float) -> dict[str, Timing]:
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


def open_cuda(what: str, rehearse: bool) -> CudaDevice:
    """The current GPU, made torch's default device; exits with 2 and the reason where ``what``
    cannot run on one. For a rehearsal the CPU, on one thread: what is tiny is only held up by more.
    """
    if rehearse:
        torch.set_num_threads(1)
        return Rehearsal()
    require(what)
    torch.set_default_device("cuda")
    return CudaDevice()
