"""Whose memory a value is in: views share that of another."""

from __future__ import annotations

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
