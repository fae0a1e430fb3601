"""Values that depend on nothing but literals: masks, positions, tables of angles, numbers."""

from __future__ import annotations

import torch
from torch.utils._python_dispatch import _disable_current_modes

from .ir import Equation, Graph, Value, bind, substitute
from .operators import is_unique

aten = torch.ops.aten


class Literals:
    """Computes, once each, the values of a graph that depend on nothing but literals. What takes more than `largest` bytes
    counts as unknown."""

    def __init__(self, graph: Graph, largest: int = 1 << 29):
        self.largest = largest
        self.constants = graph.constants
        self.producers = graph.producers()
        self._known: dict[Value, torch.Tensor | None] = {}

    def __call__(self, v: Value) -> torch.Tensor | None:
        """What `v` is; None if it depends on an input, on a tensor that the function closes over (whose owner may change
        it) or on chance, or is too large."""
        todo = [v]
        while todo:
            at = todo[-1]
            eq = self.producers.get(at)
            if at in self._known:
                todo.pop()
            elif eq is None or not self._computed(eq):
                self._known[at] = None
            elif is_literal(eq, self.constants):
                self._known[at] = self.constants[eq.args[0]]
            elif any(self._known.get(x, x) is None for x in eq.inputs):
                self._known.update(dict.fromkeys(eq.results))
            elif missing := [x for x in eq.inputs if x not in self._known]:
                todo += missing
            else:
                with _disable_current_modes(), torch.no_grad():
                    result = eq.op(*substitute(eq.args, self._known), **substitute(eq.kwargs, self._known))
                bind(eq.outputs, result, self._known)
        return self._known[v]

    def _computed(self, eq: Equation) -> bool:
        return not is_unique(eq.op) and "empty" not in eq.name and sum(v.nbytes for v in eq.results) <= self.largest


def is_literal(eq: Equation, constants: dict[Value, torch.Tensor]) -> bool:
    """Does it bring in a tensor made of numbers in the program, as `torch.tensor([1.0, 2.0])` does?"""
    return eq.op is aten.lift_fresh.default and eq.args[0] in constants
