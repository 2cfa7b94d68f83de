# SPDX-License-Identifier: Apache-2.0
"""The emulated kernels, with and without the int4 MMA."""

import platform
from functools import partial
from pathlib import Path

import pytest
import torch
from compiled import compiled
from emulator import FLAGS, Emulator, build_emulator


@pytest.fixture(scope="session", autouse=True)
def _x86_64() -> None:
    if platform.machine() not in ("x86_64", "AMD64"):
        pytest.skip("the emulator switches fibers in x86-64 assembly")


def emulator(name: str, *, native_int4: bool) -> Emulator:
    """The library as it was built before, or built now."""
    build = partial(build_emulator, native_int4=native_int4)
    script = Path(__file__).with_name("emulator.py")
    return Emulator(compiled(f"{name}.so", [script], FLAGS, build))


@pytest.fixture(scope="session")
def emulator_int4() -> Emulator:
    """The kernels as sm_80 to sm_89 compile them."""
    return emulator("int4", native_int4=True)


@pytest.fixture(scope="session")
def emulator_int8() -> Emulator:
    """The kernels as later architectures compile them."""
    return emulator("int8", native_int4=False)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
