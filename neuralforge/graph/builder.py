"""Adding equations to a graph in the making."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

from .ir import Equation, Graph, Value, map_tree


class Builder:
    """Holds the equations of a new version of `graph`; `emit` applies an operator to values and gives the result's
    values, typed by running it on fake tensors."""

    def __init__(self, graph: Graph):
        self.equations: list[Equation] = []
        known = (*graph.inputs, *graph.constants, *(v for eq in graph.equations[:1] for v in eq.results))
        self._mode = known[0].fake.fake_mode if known else nullcontext()
        self._taken = {v.name for v in (*graph.inputs, *graph.constants)}
        self._taken.update(v.name for eq in graph.equations for v in eq.results)
        self._next = len(self._taken)

    def emit(self, op: Callable, *args: Any, source: str = "", origin: str = "", **kwargs: Any) -> Any:
        fakes = map_tree(lambda leaf: leaf.fake if isinstance(leaf, Value) else leaf, (args, kwargs))
        with self._mode:
            out = op(*fakes[0], **fakes[1])
        outputs = map_tree(lambda leaf: self._value(leaf) if hasattr(leaf, "stride") else leaf, out)
        self.equations.append(Equation(op, args, kwargs, outputs, source, origin))
        return outputs

    def _value(self, fake: Any) -> Value:
        while f"v{self._next}" in self._taken:
            self._next += 1
        self._taken.add(f"v{self._next}")
        return Value(f"v{self._next}", fake)

