"""Products of bfloat16 computed in float32, on a CPU that has no instructions for them: PyTorch takes 25 times as long
for them there as for float32."""

from __future__ import annotations

import torch

from ...graph.builder import Builder
from ...graph.ir import Equation, Graph, Value
from ...graph.operators import operator_traits
from ...kernels.toolchain import has_bfloat16

aten = torch.ops.aten
PRODUCTS = {aten.mm.default, aten.addmm.default, aten.bmm.default, aten.baddbmm.default}
NEAR = 2
"""Over how many products a float32 copy is kept. One from the forward pass for the backward pass would take the memory
that bfloat16 saves."""


def widen_products(graph: Graph) -> Graph:
    """Values stay in bfloat16 from one product to the next, products read and write float32. What was float32 before it
    was rounded for a product, and is at hand, is read as it was: weights are converted not even once."""
    if has_bfloat16() or not any(_narrow(eq) for eq in graph.equations):
        return graph
    return _Widening(graph).run()


def _narrow(eq: Equation) -> bool:
    if eq.op not in PRODUCTS:
        return False
    values = (*eq.args, eq.outputs)
    return all(isinstance(v, Value) and v.dtype == torch.bfloat16 and v.device.type == "cpu" for v in values)


class _Widening:
    def __init__(self, graph: Graph):
        self.graph = graph
        self.builder = Builder(graph)
        self.producers = graph.producers()
        self.given = {*graph.inputs, *graph.constants}
        self.made: dict[Value, tuple[Value, int]] = {}  # float32 copies, and which product each was made for
        self.born: dict[Value, int] = {}  # how many products came before a value
        self.count = 0

    def run(self) -> Graph:
        for eq in self.graph.equations:
            self.born.update((v, self.count) for v in eq.results)
            if not _narrow(eq):
                self.builder.equations.append(eq)
                continue
            made = {"source": eq.source, "origin": eq.origin}
            wide = self.builder.emit(eq.op, *(self._wide(v, eq) for v in eq.args), **made, **eq.kwargs)
            rounded = Equation(aten._to_copy.default, (wide,), {"dtype": torch.bfloat16}, eq.outputs, eq.source, eq.origin)
            self.builder.equations.append(rounded)
            self.count += 1
        return self.graph.replace(equations=self.builder.equations)

    def _wide(self, v: Value, eq: Equation) -> Value:
        """The operand `v` in float32: what it is a view of is converted, and the views are taken again."""
        views = []
        while (view := self.producers.get(v)) is not None and self._keeps_all(view):
            views.append(view)
            v = view.args[0]
        wide = self._converted(v, eq)
        for view in reversed(views):
            wide = self.builder.emit(view.op, wide, *view.args[1:], source=view.source, origin=view.origin, **view.kwargs)
        return wide

    def _keeps_all(self, eq: Equation) -> bool:
        """A view of all the elements of a value laid out without gaps, the copy of which will be laid out alike."""
        if hasattr(eq.op, "graph") or not operator_traits(eq.op).is_view or not isinstance(eq.outputs, Value):
            return False
        base = eq.args[0]
        extent = 1 + sum((n - 1) * stride for n, stride in zip(base.shape, base.strides))
        return extent == base.fake.numel() == eq.outputs.fake.numel()

    def _converted(self, v: Value, eq: Equation) -> Value:
        near = self.count - self.born.get(v, 0) <= NEAR
        maker = self.producers.get(v)
        if maker is not None and maker.op is aten._to_copy.default and maker.args[0].dtype == torch.float32:
            if maker.args[0] in self.given or near:
                return maker.args[0]
        known = self.made.get(v)
        if known is None or self.count - known[1] > NEAR:
            # A late copy isn't for fusion to make early, together with its source: it doesn't know of non_blocking.
            late = {} if near else {"non_blocking": True}
            wide = self.builder.emit(
                aten._to_copy.default, v, dtype=torch.float32, source=eq.source, origin=eq.origin, **late
            )
            known = self.made[v] = wide, self.count
        return known[0]
