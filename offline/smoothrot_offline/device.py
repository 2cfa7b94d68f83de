# SPDX-License-Identifier: Apache-2.0
"""Where the heavy work of a command runs: on the CPU, or on a GPU.

A command chooses its device here and opens the source on it (``Checkpoint.on``); from there on
every function computes where its arguments are. Random numbers are drawn on the CPU, so that they
are the same for each device; what is written comes back to it.
"""

import os
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from smoothrot_offline import ranks
from smoothrot_vllm.errors import ConfigError, DeviceMemoryError

CPU = torch.device("cpu")
_OUT_OF_MEMORY = re.compile("out of memory|ALLOC_FAILED")
"""In what torch's allocator, the CUDA runtime and cuBLAS say then; only the first has an error
of its own."""


@dataclass(frozen=True)
class DeviceChoice:
    """A device and, in words, why it is this one."""

    device: torch.device
    reason: str

    @property
    def described(self) -> str:
        """For people: the device, the GPU's name, and the reason."""
        return f"{device_name(self.device)}, {self.reason}"


def choose_device(option: str, workers: int = 1) -> DeviceChoice:
    """The device that ``--device`` stands for. Each of several ranks has a GPU of its own.

    Args:
        option: ``auto`` (a GPU if torch can use one, else the CPU), ``cpu``, ``cuda`` (the first
            GPU) or ``cuda:N``.
        workers: processes that convert; ``auto`` takes the CPU for more than one.

    Raises:
        ConfigError: the option is none of these, or torch cannot use such a GPU.
    """
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    place = ranks.place()
    if option == "auto":
        if workers > 1:
            return DeviceChoice(CPU, f"as --workers {workers} work on it")
        if not count:
            return DeviceChoice(CPU, f"as torch {torch.__version__} can use no GPU")
        if place is None:
            return DeviceChoice(torch.device("cuda", 0), "the first GPU")
        option = "cuda"
    if option == "cpu":
        return DeviceChoice(CPU, "as asked for")
    match = re.fullmatch(r"cuda(?::(\d+))?", option)
    if match is None:
        raise ConfigError(
            f"--device {option}: expected auto, cpu, cuda or cuda:N, got {option!r}. Leave it out"
            " for auto."
        )
    if match[1] and place is not None:
        raise ConfigError(
            f"--device {option}: expected auto, cpu or cuda under torchrun, where each rank has a"
            " GPU of its own. Choose GPUs with CUDA_VISIBLE_DEVICES."
        )
    index = int(match[1] or place or 0)
    if index >= count:
        raise ConfigError(
            f"--device {option}: expected GPU {index} of those that torch can use, got {count} of"
            f" them with torch {torch.__version__}. Check nvidia-smi and that torch was built for"
            " CUDA, or use --device cpu."
        )
    reason = "as asked for" if place is None else "one for each rank"
    return DeviceChoice(torch.device("cuda", index), reason)


def device_name(device: torch.device) -> str:
    """``cpu``, or the GPU's number and name."""
    return "cpu" if device.type == "cpu" else f"{device} ({torch.cuda.get_device_name(device)})"


def device_kind(device: torch.device) -> str:
    """What the last bits of a result depend on: ``cpu``, or the GPU's name, whichever number it
    has."""
    return "cpu" if device.type == "cpu" else f"{device.type} {torch.cuda.get_device_name(device)}"


@contextmanager
def computing_on(device: torch.device) -> Iterator[None]:
    """While the context lasts, a GPU computes in full float32, and by algorithms that give the same
    bits each time.

    Raises:
        DeviceMemoryError: the GPU's memory is used up.
    """
    if device.type == "cpu":
        yield
        return
    precision = torch.get_float32_matmul_precision()
    deterministic, warns = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    # Read when cuBLAS is first used: without a fixed workspace its sums may come in another order.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.set_float32_matmul_precision("highest")
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with warnings.catch_warnings():
            # Of equal values it may pick any, but only the value is asked for.
            warnings.filterwarnings("ignore", message="kthvalue CUDA")
            yield
    except RuntimeError as error:
        if not _OUT_OF_MEMORY.search(str(error)):
            raise
        raise DeviceMemoryError(
            f"{device_name(device)}: expected more memory: {str(error).partition('. ')[0]}. Free"
            " the GPU of other programs, take fewer --calib-samples or a text file as --calib (the"
            " whole model writes its own there), or use --device cpu."
        ) from error
    finally:
        torch.set_float32_matmul_precision(precision)
        torch.use_deterministic_algorithms(deterministic, warn_only=warns)
