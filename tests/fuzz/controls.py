# SPDX-License-Identifier: Apache-2.0
"""Readers that do what no reader may: the fuzzing that does not report each of them is worth
nothing."""

import builtins
import ctypes
import importlib
import random
import socket
import time
from collections.abc import Callable
from pathlib import Path

from targets import Files, Target

from smoothrot_offline.source.models import foreign_errors


def _untyped(_: Path) -> None:
    raise KeyError("weight_map")


def _runs_code(folder: Path) -> None:
    (folder / "ran").touch()


def _asks(_: Path) -> None:
    with foreign_errors("a model", "Fetch it again."):
        builtins.input("Do you wish to run the custom code? [y/N]")


def _connects(_: Path) -> None:
    with foreign_errors("a model", "Fetch it again."):
        socket.socket().connect(("127.0.0.1", 9))


def _fills_memory(_: Path) -> None:
    with foreign_errors("a model", "Fetch it again."):
        bytearray(1 << 33)


def _hides_full_memory(_: Path) -> None:
    with foreign_errors("a model", "Fetch it again."):
        importlib.import_module("torch").empty(1 << 33)


def _hangs(_: Path) -> None:
    while True:
        pass


def _waits(_: Path) -> None:
    time.sleep(3600)


def _crashes(_: Path) -> None:
    ctypes.string_at(0)


def _unchanged(_: Files, __: random.Random) -> Files:
    return {}


def _control(name: str, run: Callable[[Path], None]) -> Target:
    return Target(name, 0.0005, "source", _unchanged, run)


TARGETS = (
    _control("untyped", _untyped),
    _control("runs_code", _runs_code),
    _control("asks", _asks),
    _control("connects", _connects),
    _control("fills_memory", _fills_memory),
    _control("hides_full_memory", _hides_full_memory),
    _control("hangs", _hangs),
    _control("waits", _waits),
    _control("crashes", _crashes),
)
