"""Value numbering: two values have the same number if the same operators made them from the same numbers. Copies, aliases and the
like count for nothing.
"""

from __future__ import annotations

from typing import Any

import torch

from ...graph.ir import Equation, Graph, Value
from ...graph.operators import is_unique
from .dataflow import is_identity
from .views import viewed

aten = torch.ops.aten


class Numbers:
    """Of each value of a graph its number."""

    def __init__(self, graph: Graph):
        self.of: dict[Value, int] = {}
        self.values: dict[int, list[Value]] = {}
        """The values of a number, but for copies and aliases."""
        self.makers: dict[int, list[Equation]] = {}
        self.readers: dict[int, list[Equation]] = {}
        self.known: dict[Any, int] = {}
        self.taken: set[Equation] = set()
        """Of backward passes that are replaced already. That of a linear function doesn't tell which call of it it belongs to:
        the first match takes those of all."""
        for v in (*graph.inputs, *graph.constants):
            self._name(v, (v,))
        for eq in graph.equations:
            if is_identity(eq):
                self.of[eq.outputs] = self.of[eq.args[0]]
            else:
                key = self.key(eq, self.of)
                for i, v in enumerate(eq.results):
                    self.makers.setdefault(self._name(v, (key, i)), []).append(eq)
            for n in {self.of[v] for v in eq.inputs}:
                self.readers.setdefault(n, []).append(eq)

    def _name(self, v: Value, key: tuple) -> int:
        n = self.of[v] = self.known.setdefault(key, len(self.known))
        self.values.setdefault(n, []).append(v)
        return n

    def key(self, eq: Equation, of: dict[Value, int]) -> Any:
        """What tells the results of `eq` apart from others, given the numbers of its operands."""
        if is_unique(eq.op):
            return (eq,)
        # What was computed again on purpose is not what was computed before.
        again = eq.origin.startswith("recomputed")
        name, args = form(eq)
        operands = tuple([hashable(a, of) for a in args])
        return again, name, frozenset(operands) if name in COMMUTATIVE else operands, hashable(eq.kwargs, of)


def form(eq: Equation) -> tuple[Any, tuple]:
    """Operator and arguments, one way of saying it for views that come to the same."""
    dims = viewed(eq)
    return (eq.op, eq.args) if dims is None else ("view", (eq.args[0], (*dims, *eq.outputs.shape)))


COMMUTATIVE = {aten.add.Tensor, aten.mul.Tensor}
"""Of their two operands."""


def hashable(x: Any, of: dict[Value, int]) -> Any:
    """Arguments of an operator with their values' numbers in place of these."""
    if isinstance(x, Value):
        return "v", of[x]
    if type(x) in (int, bool):  # most are
        return type(x), x
    if isinstance(x, dict):
        return tuple([(k, hashable(x[k], of)) for k in sorted(x)])
    if isinstance(x, (list, tuple)):
        return tuple([hashable(item, of) for item in x])
    return type(x), repr(x)
