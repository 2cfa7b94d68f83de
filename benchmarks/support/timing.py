# SPDX-License-Identifier: Apache-2.0
"""How a call is timed, and what a machine does at best: the floors that times are held against."""

import ctypes
import statistics
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np

Clock = Callable[[], float]


@dataclass(frozen=True)
class Timing:
    """Seconds of one call: ``median`` over the rounds and the ``best`` of them."""

    median: float
    best: float


@dataclass(frozen=True)
class Floors:
    """What a whole device reaches without doing our work: bytes/s read from DRAM, int8 and int4
    multiply-adds/s or None."""

    read_bytes: float
    multiply_adds: float | None
    int4_multiply_adds: float | None = None

    def record(self) -> dict[str, float | None]:
        """As a report has them."""
        return {f"{name}_per_s": value for name, value in asdict(self).items()}

    def multiply_adds_of(self, int4: bool) -> float | None:
        """Of int8 operands or, where ``int4`` says so and the device multiplies them, of int4."""
        return (self.int4_multiply_adds if int4 else None) or self.multiply_adds


def time_alternately(
    contenders: Mapping[str, Callable[[], object]],
    rounds: int,
    seconds: float,
    clock: Clock = time.perf_counter,
) -> dict[str, Timing]:
    """Time contenders in turn, so that a drift of the machine meets them all alike.

    Args:
        contenders: what to call, by name.
        rounds: measurements of each.
        seconds: each measurement repeats its call for at least this long, and is their mean.
        clock: seconds.
    """
    repeats = {}
    for name, call in contenders.items():
        call()
        start = clock()
        call()
        repeats[name] = max(1, round(seconds / max(clock() - start, 1e-7)))
    measured: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, call in contenders.items():
            start = clock()
            for _ in range(repeats[name]):
                call()
            measured[name].append((clock() - start) / repeats[name])
    return {name: Timing(statistics.median(times), min(times)) for name, times in measured.items()}


def measure_floors(threads: int, rounds: int = 15) -> Floors:
    """Best read bandwidth and int8 dot-product rate of ``threads`` threads together; needs g++."""
    with tempfile.TemporaryDirectory() as folder:
        library = str(Path(folder) / "peak.so")
        source = str(Path(__file__).with_name("peak.cpp"))
        subprocess.run(
            ["g++", "-O2", "-march=native", "-shared", "-fPIC", source, "-o", library], check=True
        )
        peak = ctypes.CDLL(library)
    peak.read_all.argtypes = (ctypes.c_void_p, ctypes.c_int64)
    peak.dot_products.argtypes = (ctypes.c_int64,)
    peak.dot_products_per_turn.restype = ctypes.c_int64
    share, turns = 128 << 20, 500_000
    data = np.ones(threads * share, dtype=np.uint8)
    with ThreadPoolExecutor(threads) as pool:
        together = threading.Barrier(threads)

        def timed(work: Callable[[int], object], thread: int) -> tuple[float, float]:
            together.wait()
            start = time.perf_counter()
            work(thread)
            return start, time.perf_counter()

        def best(work: Callable[[int], object]) -> float:
            # From the first start to the last end: threads that a busy machine runs one after the
            # other each find all of the bandwidth theirs.
            seconds = []
            for _ in range(rounds):
                starts, ends = zip(*pool.map(partial(timed, work), range(threads)), strict=True)
                seconds.append(max(ends) - min(starts))
            return min(seconds)

        read = threads * share / best(lambda i: peak.read_all(data.ctypes.data + i * share, share))
        per_turn = peak.dot_products_per_turn()
        dots = (
            threads * turns * per_turn / best(lambda _: peak.dot_products(turns))
            if per_turn
            else None
        )
    return Floors(read, dots)
