# SPDX-License-Identifier: Apache-2.0
"""Where serve.py serves: what a device adds to the command line of ``vllm serve`` and to the
report."""

import time
from pathlib import Path
from typing import Any

from benchmarks.support.commands import options
from benchmarks.support.gpu_ready import require
from benchmarks.support.machine import machine
from benchmarks.support.report import RESULTS
from benchmarks.support.timing import Floors, measure_floors

TOGETHER = 0.9
"""Of a GPU's memory, what the servers of a model may claim together; the rest is for the driver
and this process."""
SETTLE_SECONDS, SETTLE_READINGS = 1.0, 10


class CpuServing:
    """All cores of this process."""

    output: Path | None = None
    """Where the report goes unless the command line says otherwise."""

    def facts(self) -> dict[str, Any]:
        """What the report says of the machine."""
        return machine()

    def floors(self) -> Floors:
        """What it reaches without doing our work."""
        return measure_floors(machine()["cores"])

    def options(self, cache_bytes: int, servers: int) -> list[str]:
        """Options of one of so many servers that are up together, each with so large a cache of
        keys and values; the cache of a CPU is a variable."""
        return []

    def environment(self, cache_bytes: int) -> dict[str, str]:
        """Variables of a server."""
        # A compiled graph that was saved does not load on a CPU in vLLM 0.32; the caches below it
        # do their work.
        return {"VLLM_CPU_KVCACHE_SPACE": str(cache_bytes >> 30), "VLLM_USE_AOT_COMPILE": "0"}

    def used_bytes(self) -> int:
        """Memory of a GPU that is in use."""
        return 0


class CudaServing(CpuServing):
    """The current GPU. All servers of a model are up together and are asked in turn, so that a
    drift of its clocks meets all.

    A server that is asked nothing holds memory and leaves the GPU alone, so it takes no time from
    the others.
    """

    def __init__(self) -> None:
        from benchmarks.kernels.cuda import CudaDevice

        self.device = CudaDevice()
        self.output = RESULTS / self.device.name / "serve.json"

    def facts(self) -> dict[str, Any]:
        """Of the host and the GPU; the clock of the kernels' times is not that of the client,
        which times here."""
        gpu = self.device.facts()
        return machine() | {name: fact for name, fact in gpu.items() if name != "clock"}

    def floors(self) -> Floors:
        """As layers.py measures them; the memory that this took is given back, as servers need
        it."""
        import torch

        with torch.device("cuda"):
            floors = self.device.floors()
        torch.cuda.empty_cache()
        return floors

    def options(self, cache_bytes: int, servers: int) -> list[str]:
        """The same cache for each, rather than whatever vLLM finds free, and an even share that has
        to be free at its start.

        vLLM takes the cache's size as given and does not hold a server to its share, so large
        weights may take more than one: then it is a later server that finds too little free and is
        refused.
        """
        share = int(100 * TOGETHER / servers) / 100
        return options(kv_cache_memory_bytes=cache_bytes, gpu_memory_utilization=share)

    def environment(self, cache_bytes: int) -> dict[str, str]:
        """vLLM's own defaults."""
        return {}

    def used_bytes(self) -> int:
        """Of the whole GPU, once two readings agree or after the last: what a killed server had
        comes back a moment after its end."""
        import torch

        used = -1
        for _ in range(SETTLE_READINGS):
            free, total = torch.cuda.mem_get_info()
            last, used = used, total - free
            if used == last:
                break
            time.sleep(SETTLE_SECONDS)
        return used


def open_device(name: str) -> CpuServing:
    """The device that the command line names; ends with status 2 and the reason where it cannot
    be used."""
    if name == "cpu":
        return CpuServing()
    require("serve.py --device cuda", serving=True)
    return CudaServing()
