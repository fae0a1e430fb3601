"""What makes and what reads each value of a graph, and what it is a view of."""

from __future__ import annotations

import math
from typing import Any

import torch

from ...graph.ir import Equation, Graph, Value, leaves
from ...graph.literals import Literals
from ..space import contiguous
from .views import Dims, compose, covers, natural, reshaped, viewed


class Dataflow:
    """A graph with what rules ask of it."""

    def __init__(self, graph: Graph):
        self.graph = graph
        self.producers = graph.producers()
        self.users = graph.users()
        self.position = {eq: i for i, eq in enumerate(graph.equations)}
        self.results = set(leaves(graph.outputs))
        self._literals = Literals(graph)

    def producer(self, v: Any, *ops: Any) -> Equation | None:
        """The equation that makes `v`, looking through copies and aliases, if its operator (or packet) is among `ops`."""
        while isinstance(v, Value) and v in self.producers:
            eq = self.producers[v]
            if not ops or eq.op in ops or getattr(eq.op, "overloadpacket", None) in ops:
                return eq
            if not is_identity(eq):
                return None
            v = eq.args[0]
        return None

    def same(self, v: Any) -> Any:
        """What `v` is a copy or alias of."""
        while isinstance(v, Value) and v in self.producers and is_identity(self.producers[v]):
            v = self.producers[v].args[0]
        return v

    def literal(self, v: Any) -> torch.Tensor | None:
        """What `v` is if it depends on nothing but literals: masks, positions. None if it isn't, or is huge."""
        if not isinstance(v, Value):
            return torch.tensor(v) if isinstance(v, (int, float, bool)) else None
        return self._literals(v)

    def root(self, v: Value, reader: Equation) -> tuple[Value, Dims]:
        """What `v`, an operand of `reader`, is a view of, and which, unless others read what lies in between."""
        root, at, dims = v, v, natural(v.shape)
        found = dims
        while at in self.producers and at not in self.results and (at is v or self.users[at] == [reader]):
            reader = self.producers[at]
            dims = compose(dims, viewed(reader), at.shape)
            if dims is None or not covers(dims, reader.args[0].shape):
                break
            root = at = reader.args[0]
            found = dims
        return root, found

    def trace(self, v: Value) -> tuple[Value, Dims]:
        """What `v` is a view of, and which."""
        dims = natural(v.shape)
        while v in self.producers:
            further = compose(dims, viewed(self.producers[v]), v.shape)
            if further is None:
                break
            v, dims = self.producers[v].args[0], further
        return v, dims

    def whole(self, v: Value) -> Value | None:
        """The contiguous value that `v`, contiguous too, is all of, in its order; None if it isn't so."""
        root, dims = self.trace(v)
        return root if contiguous(v) and contiguous(root) and reshaped(dims, root.shape, v.shape) else None

    def last_view(self, v: Value) -> tuple[Value, Dims]:
        """The last view of `v` that everybody reads it through, and which; nothing of it repeated."""
        dims = natural(v.shape)
        while v not in self.results and len(users := self.users.get(v, ())) == 1:
            further = compose(viewed(users[0]), dims, v.shape)
            if further is None or any(run.axis is None for dim in further for run in dim):
                break
            v, dims = users[0].outputs, further
        return v, dims

    def place(self, v: Value) -> int:
        """The position of the equation that makes `v`; -1 for what is given."""
        return self.position[self.producers[v]] if v in self.producers else -1

    def between(self, outputs: list[Value], inputs: set[Value], limit: float = math.inf) -> list[Equation]:
        """The equations that compute `outputs` from `inputs`, in order; some of them, if there are more than `limit`."""
        found: set[Equation] = set()
        todo = list(outputs)
        while todo and len(found) <= limit:
            v = todo.pop()
            eq = self.producers.get(v)
            if v not in inputs and eq is not None and eq not in found:
                found.add(eq)
                todo += eq.inputs
        return sorted(found, key=self.position.__getitem__)


def is_identity(eq: Equation) -> bool:
    """Does it hand on its operand, but for the layout in memory?"""
    dims = viewed(eq)
    return dims is not None and eq.args[0].shape == eq.outputs.shape and dims == natural(eq.args[0].shape)
