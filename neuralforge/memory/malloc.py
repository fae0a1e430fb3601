"""glibc's malloc hands large blocks back to the kernel at every free, and each new one costs a page fault per 4 KiB:
a 64 MiB result of a matrix product spends 40 % of its time there."""

from __future__ import annotations

import ctypes
import sys
from functools import cache

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3


@cache
def keep_pages() -> bool:
    """Ask malloc to keep freed memory in the process for reuse. Returns whether the C library took it."""
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except AttributeError:  # musl has no mallopt
        return False
    return bool(mallopt(M_MMAP_THRESHOLD, 1 << 30) and mallopt(M_TRIM_THRESHOLD, (1 << 31) - 1))


def give_pages_back() -> None:
    """Hand what malloc keeps free back to the kernel, as after work whose memory nothing to come needs."""
    if keep_pages():
        ctypes.CDLL(None).malloc_trim(0)
