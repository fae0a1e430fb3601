"""Offsets in one arena for buffers whose lifetimes are known beforehand."""

from __future__ import annotations

import threading
import weakref
from dataclasses import dataclass
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

    Largest first, each at the lowest offset where it fits ("greedy by size", Pisarchyk & Lee 2020,
    https://arxiv.org/abs/2001.03288).
    """
    order = sorted((b for b in buffers if b.nbytes), key=lambda b: -b.nbytes)
    first, last, start, end = (np.zeros(len(order), dtype=np.int64) for _ in range(4))
    for n, buffer in enumerate(order):
        rivals = np.nonzero((first[:n] <= buffer.last) & (last[:n] >= buffer.first))[0]
        size = -(-buffer.nbytes // ALIGNMENT) * ALIGNMENT
        offset = 0
        for i in rivals[np.argsort(start[rivals], kind="stable")]:
            if offset + size <= start[i]:
                break
            offset = max(offset, int(end[i]))
        buffer.offset = offset
        first[n], last[n], start[n], end[n] = buffer.first, buffer.last, offset, offset + size
    for buffer in buffers:
        buffer.offset = max(buffer.offset, 0)
    return int(end.max(initial=0))


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
