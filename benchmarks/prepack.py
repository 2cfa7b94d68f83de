# SPDX-License-Identifier: Apache-2.0
"""How fast loading turns stored weights into the kernels' layout, and the memory that it takes
on top."""

import ctypes
import statistics
import time
from pathlib import Path
from typing import Any

import torch

from smoothrot_vllm import ops

SHAPES = {"down_proj of Llama-3.2-1B": (2048, 8192), "gate_up_proj of Llama-3-8B": (28672, 4096)}


def measure_prepack(rounds: int = 5) -> list[dict[str, Any]]:
    """``ops.prepack_weight`` of 4-bit weights, per channel and in groups of 128, on one thread.

    ``gb_per_s`` counts the stored codes; ``peak_of_packed`` is the most memory that a call added,
    as a share of its result.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return [
            _measure(name, *shape, group, rounds)
            for name, shape in SHAPES.items()
            for group in (-1, 128)
        ]
    finally:
        torch.set_num_threads(threads)


def _measure(name: str, columns: int, inputs: int, group: int, rounds: int) -> dict[str, Any]:
    weight = torch.randint(0, 256, (columns, inputs // 2), dtype=torch.uint8)
    scale = torch.rand(columns, 1 if group == -1 else inputs // group)
    seconds, shares = [], []
    for _ in range(rounds):
        before = _reset_peak()
        start = time.perf_counter()
        packed = ops.prepack_weight(weight, scale, 4)
        seconds.append(time.perf_counter() - start)
        shares.append((_status("VmHWM") - before) / packed.nbytes)
        del packed
    return {
        "weight": name,
        "shape": [columns, inputs],
        "group_size": group,
        "gb_per_s": round(weight.nbytes / statistics.median(seconds) / 1e9, 3),
        "peak_of_packed": round(max(shares), 3),
    }


def _reset_peak() -> int:
    """Forget the peak of resident memory; what is resident now, in bytes.

    Freed memory goes back to the system first: a result that is written over it would not be seen.
    """
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def _status(field: str) -> int:
    (line,) = (
        line
        for line in Path("/proc/self/status").read_text().splitlines()
        if line.startswith(f"{field}:")
    )
    return int(line.split()[1]) * 1024
