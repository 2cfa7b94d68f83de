# SPDX-License-Identifier: Apache-2.0
"""What a machine for ``make gpu-proof`` is: GPU, driver, compiler, torch, processor, memory,
packages and the tree's commit.

Prints what it finds as JSON, also to the file named by the only argument. Imports nothing that a
machine may lack.
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.support.machine import machine, packages

QUERY = (
    "name,driver_version,memory.total,clocks.max.sm,clocks.max.mem,power.limit,"
    "mig.mode.current,ecc.mode.current"
)


def said_by(*command: str) -> str:
    """What a command prints, or that it is missing or failed."""
    if shutil.which(command[0]) is None:
        return "not on PATH"
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=20)
    return (
        done.stdout.strip()
        if done.returncode == 0
        else f"exit status {done.returncode}: {done.stderr.strip()[-300:]}"
    )


def torch_facts() -> dict[str, Any]:
    """torch's version, its CUDA and the GPUs it sees."""
    import torch

    found: dict[str, Any] = {"torch_cuda": torch.version.cuda, "gpus": []}
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        properties = torch.cuda.get_device_properties(index)
        found["gpus"].append(
            {
                "name": properties.name,
                "capability": f"{properties.major}.{properties.minor}",
                "multiprocessors": properties.multi_processor_count,
                "memory_bytes": properties.total_memory,
                "l2_bytes": properties.L2_cache_size,
            }
        )
    found["gpu"] = found["gpus"][0]["name"] if found["gpus"] else "none"
    return found


def main() -> None:
    """Gather and write; a source that fails is named with its error."""
    facts: dict[str, Any] = {"packages": packages()}
    for gather in (torch_facts, machine):
        try:
            facts |= gather()
        except Exception as error:
            facts[gather.__name__] = f"{type(error).__name__}: {error}"
    facts["nvidia_smi"] = said_by("nvidia-smi", f"--query-gpu={QUERY}", "--format=csv,noheader")
    facts["nvcc"] = said_by("nvcc", "--version").rpartition("\n")[2]
    facts["compute_sanitizer"] = said_by("compute-sanitizer", "--version").rpartition("\n")[2]
    facts["commit"] = said_by("git", "describe", "--always", "--dirty", "--abbrev=40")
    text = json.dumps(facts, indent=1)
    Path(sys.argv[1]).write_text(text)
    print(text)


if __name__ == "__main__":
    main()
