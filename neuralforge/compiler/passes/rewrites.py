"""The rewrites of a compilation: noted for `explain`, and counted, so that a wrong one can be bisected."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import NamedTuple

from ...errors import NeuralForgeError


class Rewrite(NamedTuple):
    rule: str
    source: str
    """The user's line."""
    reason: str


class Rewrites:
    """Those `made` and those `refused`, in order. No more than `limit` are made (None: the environment variable
    NEURALFORGE_MAX_REWRITES, or all): halve it until the one is found that changes a result."""

    def __init__(self, limit: int | None = None):
        text = os.environ.get("NEURALFORGE_MAX_REWRITES") if limit is None else str(limit)
        if text and not text.isdigit():
            raise NeuralForgeError(f"max_rewrites={text}; expected how many rewrites to make at most: 0, 12, ...")
        self.limit = int(text) if text else None
        self.made: list[Rewrite] = []
        self.refused: list[Rewrite] = []

    @contextmanager
    def noting(self) -> Iterator[None]:
        """Within, passes note their rewrites here."""
        token = _current.set(self)
        try:
            yield
        finally:
            _current.reset(token)


_current: ContextVar[Rewrites | None] = ContextVar("rewrites", default=None)


def make(rule: str, source: str, reason: str) -> bool:
    """Note a rewrite that is about to be made; False if it mustn't be."""
    rewrites = _current.get()
    if rewrites is None:
        return True
    if rewrites.limit is not None and len(rewrites.made) >= rewrites.limit:
        return False
    rewrites.made.append(Rewrite(rule, source, reason))
    return True


def refuse(rule: str, source: str, reason: str) -> None:
    """Note why something that looked like a match was left alone."""
    rewrites = _current.get()
    if rewrites is not None:
        rewrites.refused.append(Rewrite(rule, source, reason))
