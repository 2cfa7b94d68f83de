# SPDX-License-Identifier: Apache-2.0
"""The emulated kernels, built once a session, with and without the int4 MMA."""

import platform

import pytest
import torch
from emulator import Emulator, build_emulator


@pytest.fixture(scope="session", autouse=True)
def _x86_64() -> None:
    if platform.machine() not in ("x86_64", "AMD64"):
        pytest.skip("the emulator switches fibers in x86-64 assembly")


@pytest.fixture(scope="session")
def emulator_int4(tmp_path_factory: pytest.TempPathFactory) -> Emulator:
    """The kernels as sm_80 to sm_89 compile them."""
    return Emulator(
        build_emulator(tmp_path_factory.mktemp("emulator") / "int4.so", native_int4=True)
    )


@pytest.fixture(scope="session")
def emulator_int8(tmp_path_factory: pytest.TempPathFactory) -> Emulator:
    """The kernels as later architectures compile them."""
    return Emulator(
        build_emulator(tmp_path_factory.mktemp("emulator") / "int8.so", native_int4=False)
    )


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
