# SPDX-License-Identifier: Apache-2.0
"""One GPU as serve.py serves on it: its share for each server, and how much of its memory a
server uses."""

import subprocess
import time
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, Floors, machine
from device_cuda import CudaDevice
from serve_devices import GpuMemory
from serving import processes

TOGETHER = 0.9
"""Of the memory, what the servers of a model may claim together; the rest is for the driver and
this process."""
SETTLE_SECONDS, SETTLE_READINGS = 1.0, 10
NVIDIA_SMI = (
    "nvidia-smi",
    "--query-compute-apps=pid,used_gpu_memory",
    "--format=csv,noheader,nounits",
)


class CudaServing:
    """The current GPU. All servers of a model are up together and are asked in turn, so that a
    drift of its clocks meets all.

    A server that is asked nothing holds memory and leaves the GPU alone, so it takes no time from
    the others.
    """

    other_peers: Mapping[str, str] = {
        "llama.cpp": "serve.py runs it on CPUs only, with --device cpu"
    }

    def __init__(self) -> None:
        self.device = CudaDevice()
        self.output: Path | None = RESULTS / self.device.name / "serve.json"

    def facts(self) -> dict[str, Any]:
        """Of the host and the GPU; the clock of the kernels' times is not that of the client,
        which times here."""
        return machine() | {
            name: fact for name, fact in self.device.facts().items() if name != "clock"
        }

    def floors(self) -> Floors:
        """As kernels.py measures them; the memory that this took is given back, as servers need
        it."""
        with torch.device("cuda"):
            floors = self.device.floors()
        torch.cuda.empty_cache()
        return floors

    def prepack(self) -> list[dict[str, Any]]:
        """Nothing: a GPU's kernels read the codes as they are stored."""
        return []

    def options(self, cache_bytes: int, servers: int) -> list[str]:
        """The same cache for each, rather than whatever vLLM finds free, and an even share that has
        to be free at its start.

        vLLM takes the cache's size as given and does not hold a server to its share, so large
        weights may take more than one: then it is a later server that finds too little free and is
        refused.
        """
        share = int(100 * TOGETHER / servers) / 100
        return ["--kv-cache-memory-bytes", str(cache_bytes), "--gpu-memory-utilization", str(share)]

    def environment(self, cache_bytes: int) -> dict[str, str]:
        """vLLM's own defaults."""
        return {}

    def watch(self) -> GpuMemory:
        """Bytes that the driver counts for the server's processes, or what the whole GPU has in use
        more than before.

        The second is for containers, where nvidia-smi often does not see processes; it is right if
        nobody else uses the GPU.
        """
        before = settled_bytes()

        def measure(pid: int) -> dict[str, Any]:
            of_processes = bytes_of(processes(pid))
            if of_processes is not None:
                return {"gpu_bytes": of_processes, "gpu_bytes_of": "processes"}
            return {"gpu_bytes": max(0, used_bytes() - before), "gpu_bytes_of": "device"}

        return measure


def used_bytes() -> int:
    """Memory of the current GPU that anyone uses."""
    free, total = torch.cuda.mem_get_info()
    return total - free


def settled_bytes() -> int:
    """The same once two readings agree, or after the last: what a killed server had comes back a
    moment after its end."""
    used = used_bytes()
    for _ in range(SETTLE_READINGS):
        time.sleep(SETTLE_SECONDS)
        last, used = used, used_bytes()
        if used == last:
            break
    return used


def bytes_of(pids: Collection[int]) -> int | None:
    """GPU memory that the driver counts for these processes; None if nvidia-smi is not there or
    says nothing of them."""
    try:
        done = subprocess.run(NVIDIA_SMI, capture_output=True, text=True, check=False, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    rows = [line.split(",") for line in done.stdout.splitlines() if line.count(",") == 1]
    # The memory of a process that the driver cannot tell is a word in brackets.
    mebibytes = [
        int(used)
        for pid, used in rows
        if pid.strip().isdigit() and int(pid) in pids and used.strip().isdigit()
    ]
    return sum(mebibytes) << 20 if mebibytes else None
