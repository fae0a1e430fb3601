"""Offsets in one arena for buffers whose lifetimes are known beforehand."""

from __future__ import annotations

import math
import threading
import weakref
from dataclasses import dataclass
from itertools import accumulate
from operator import itemgetter
from typing import Any

import numpy as np
import torch

ALIGNMENT = 64
"""Bytes: a cache line, and the widest vector register."""


@dataclass(eq=False, slots=True)
class Buffer:
    """`nbytes` of memory in use from equation `first` to equation `last`, both included."""

    nbytes: int
    first: int
    last: int
    offset: int = -1


def assign_offsets(buffers: list[Buffer]) -> int:
    """Give every buffer an offset such that no two that live at once overlap; return the arena's size in bytes.

    Largest first, those in use longest first among equals, each at the lowest offset where it fits ("greedy by size", Pisarchyk &
    Lee 2020, https://arxiv.org/abs/2001.03288). Where more is taken so than is ever in use at once: as they come into use,
    each in the smallest gap that it fits into, if that takes less.
    """
    size, offsets = _place(sorted(buffers, key=lambda b: (-b.nbytes, -b.last)), tight=False)
    if size > _most_in_use(buffers):
        size, offsets = min((size, offsets), _place(sorted(buffers, key=lambda b: (b.first, -b.nbytes)), tight=True), key=itemgetter(0))
    for buffer in buffers:
        buffer.offset = offsets[buffer]
    return size


def _place(order: list[Buffer], tight: bool) -> tuple[int, dict[Buffer, int]]:
    """The arena's size and the offsets where each has, in this order, the lowest that it fits at; or, if `tight`, that of the smallest
    gap, or above all others."""
    first, last, start, end = (np.zeros(len(order), dtype=np.int64) for _ in range(4))
    for n, buffer in enumerate(order):
        rivals = (first[:n] <= buffer.last) & (last[:n] >= buffer.first) & (start[:n] < end[:n])
        starts, ends, size = start[:n][rivals], end[:n][rivals], _aligned(buffer.nbytes)
        by_place = starts.argsort(kind="stable")
        free, best, smallest = 0, None, math.inf
        for begin, finish in zip(starts[by_place].tolist(), ends[by_place].tolist()):
            if size <= begin - free < smallest:
                best, smallest = free, begin - free
                if not tight:
                    break
            free = max(free, finish)
        offset = free if best is None else best
        first[n], last[n], start[n], end[n] = buffer.first, buffer.last, offset, offset + size
    return int(end.max(initial=0)), dict(zip(order, start.tolist()))


def _most_in_use(buffers: list[Buffer]) -> int:
    """At one time: no arena can be smaller."""
    changes = sorted([(b.first, _aligned(b.nbytes)) for b in buffers] + [(b.last + 1, -_aligned(b.nbytes)) for b in buffers])
    return max(accumulate(change for _, change in changes), default=0)


def _aligned(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


class Arena:
    """The memory of one program's buffers, or of several programs' that never run at once: who runs holds `lock`. It
    grows to what the largest needs."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.running: int | None = None
        """The thread of the program that runs, which would wait for itself if it ran another."""
        self.memory = torch.empty(0, dtype=torch.uint8)
        self._users: weakref.WeakSet[Any] = weakref.WeakSet()

    def at_least(self, nbytes: int, user: Any) -> torch.Tensor:
        """Its memory, of that many bytes or more. Where it has to grow, `release()` of the users so far is called, so that
        nothing keeps the old memory. Call with the lock held."""
        if self.memory.numel() < nbytes:
            for other in self._users:
                other.release()
            self.memory = torch.empty(0, dtype=torch.uint8)
            self.memory = torch.empty(nbytes, dtype=torch.uint8)
        self._users.add(user)
        return self.memory
