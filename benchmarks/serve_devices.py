# SPDX-License-Identifier: Apache-2.0
"""Where serve.py serves: what a device adds to the command line of ``vllm serve`` and to the
report."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from common import CLOCKS, Floors, machine, measure_floors
from prepack import measure_prepack

GpuMemory = Callable[[int], dict[str, Any]]
"""Of the process of a server that answers: what its result says of GPU memory."""


class ServeDevice(Protocol):
    """What the contenders share."""

    output: Path | None
    """Where the report goes unless the command line says otherwise."""
    other_peers: Mapping[str, str]
    """Peers that are known of and do not run there, by what their users call them."""

    def facts(self) -> dict[str, Any]:
        """What the report says of the machine."""

    def floors(self) -> Floors:
        """What it reaches without doing our work."""

    def prepack(self) -> list[dict[str, Any]]:
        """Speed and memory of repacking weights at start-up; empty where nothing is repacked."""

    def options(self, cache_bytes: int, servers: int) -> list[str]:
        """Options of one of so many servers that are up together, each with so large a cache of
        keys and values."""

    def environment(self, cache_bytes: int) -> dict[str, str]:
        """Variables of the server."""

    def watch(self) -> GpuMemory:
        """Called before a server starts; the result is called when it has answered."""


class CpuServing:
    """All cores of this process."""

    output: Path | None = None
    other_peers: Mapping[str, str] = {
        "llama-cpp-python": (
            "not installed; Q4_0 and Q8_0 of llama.cpp are schemes q4_0 and q8_0 where it is"
        ),
        "zentorch": "not installed; vLLM takes its kernels for bf16, w8a8 and w4a16 where it is",
    }

    def facts(self) -> dict[str, Any]:
        """Processor, cores and load."""
        return machine()

    def floors(self) -> Floors:
        """Of all cores together."""
        return measure_floors(machine()["cores"], CLOCKS["wall"])

    def prepack(self) -> list[dict[str, Any]]:
        """On one thread."""
        return measure_prepack()

    def options(self, cache_bytes: int, servers: int) -> list[str]:
        """None: the cache's size is a variable."""
        return []

    def environment(self, cache_bytes: int) -> dict[str, str]:
        """The cache's size, and the one cache of compiled graphs that has to stay off."""
        # A compiled graph that was saved does not load on a CPU in vLLM 0.32; the caches below it
        # do their work.
        return {"VLLM_CPU_KVCACHE_SPACE": str(cache_bytes >> 30), "VLLM_USE_AOT_COMPILE": "0"}

    def watch(self) -> GpuMemory:
        """A server here has none."""
        return lambda _: {}


def open_device(name: str) -> ServeDevice:
    """The device that the command line names; ends with status 2 and the reason where it cannot
    be used."""
    if name == "cpu":
        return CpuServing()
    from gpu_ready import require

    require("serve.py --device cuda", serving=True)
    from serve_device_cuda import CudaServing

    return CudaServing()
