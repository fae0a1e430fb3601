"""Adding equations to a graph in the making."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

from .ir import Equation, Graph, Value, leaves, map_tree, substitute
from .tree import tree_unflatten


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

    def inline(self, f: Callable, *operands: Value, source: str = "", origin: str = "") -> Any:
        """The results of `f`, a function of tensors, applied to values: its operators as equations."""
        from .capture import capture

        captured = capture(f, *(v.fake for v in operands))
        return tree_unflatten(self.splice(captured.graph, list(operands), source=source, origin=origin), captured.out_tree)

    def splice(self, graph: Graph, operands: list[Value], source: str = "", origin: str = "") -> list[Any]:
        """The outputs of a graph without constants, applied to values: its equations anew."""
        env: dict[Value, Any] = dict(zip(graph.inputs, operands))
        for eq in graph.equations:
            out = self.emit(eq.op, *substitute(eq.args, env), source=source, origin=origin, **substitute(eq.kwargs, env))
            env.update(zip(eq.results, leaves(out)))
        return substitute(graph.outputs, env)

    def _value(self, fake: Any) -> Value:
        while f"v{self._next}" in self._taken:
            self._next += 1
        self._taken.add(f"v{self._next}")
        return Value(f"v{self._next}", fake)

