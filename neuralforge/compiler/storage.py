"""Whose memory a value is in, as views share that of another, and how much of it."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..graph.ir import Equation, Graph, Value
from ..graph.operators import operator_traits
from .joined import Joined


def view_roots(graph: Graph) -> dict[Value, Value]:
    """What each view is a view of, which may be one itself."""
    return {v: eq.args[0] for eq in graph.equations if is_view(eq) for v in eq.results}


def root_of(roots: dict[Value, Value], value: Value) -> Value:
    while value in roots:
        value = roots[value]
    return value


def is_view(eq: Equation) -> bool:
    """Do the results share the memory of the first argument?"""
    return not isinstance(eq.op, Joined) and operator_traits(eq.op).is_view


def extent(shape: Sequence[int], strides: Sequence[int]) -> int:
    """Elements from the first to the last."""
    return 0 if 0 in shape else 1 + sum((n - 1) * s for n, s in zip(shape, strides))


def copied(t: torch.Tensor) -> torch.Tensor:
    """A copy with the same strides, whatever lies between elements, or is several of them at once."""
    return t.as_strided((extent(t.shape, t.stride()),), (1,)).clone().as_strided(t.shape, t.stride())
