# SPDX-License-Identifier: Apache-2.0
"""The process's allocator, set for work on large tensors."""

import ctypes
import sys

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_KEEP_BELOW = 1 << 30


def reuse_freed_memory() -> None:
    """Let glibc keep freed blocks of up to a gibibyte for the next tensor instead of giving each
    back to the system.

    A layer's activations are allocated and freed over and over; by default each time maps fresh
    pages, which must be zeroed and faulted in one by one. Does nothing where the C library is
    another.
    """
    if not sys.platform.startswith("linux"):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, _KEEP_BELOW)
        mallopt(_M_TRIM_THRESHOLD, 2 * _KEEP_BELOW - 1)
