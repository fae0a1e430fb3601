"""The operator that groups of elementwise operators and reductions become."""

from __future__ import annotations

from collections import Counter
from functools import cached_property

from ...graph.ir import Graph, Value
from ..joined import Joined
from .group import LOOKED_THROUGH
from .layout import Layout


class Fused(Joined):
    """The operator of one or more groups of equal structure: called, it interprets `graph`; `codegen` builds native
    code that runs all `parts` at once. `why` says how the group came about and what ended it."""

    def __init__(self, parts: list[Graph], why: str = ""):
        self.parts = parts
        members = [eq for eq in parts[0].equations if eq.op not in LOOKED_THROUGH]
        names = [eq.op.overloadpacket.__name__.split(".")[-1].lstrip("_") for eq in members]
        short = list(dict.fromkeys(names))
        name = "fused_" + "_".join(short[:5]) + (f"_and_{len(names) - 5}" if len(names) > 5 else "")
        graph = Graph(
            inputs=list(dict.fromkeys(v for part in parts for v in part.inputs)),
            equations=[eq for part in parts for eq in part.equations],
            outputs=[v for part in parts for v in part.outputs],
        )
        super().__init__(name + (f"_x{len(parts)}" if len(parts) > 1 else ""), why, graph)

    @cached_property
    def layouts(self) -> list[Layout]:
        return [Layout(part) for part in self.parts]

    def may_overwrite(self, output: Value, operand: Value) -> bool:
        """May `output` be put where `operand` (of the same type, read for the last time) is? Within one part an
        element is read before it is written; parts run side by side."""
        layout = self._layout_of.get(output)
        if layout is None:  # computed a second time, under other names
            return False
        alone = operand in layout.graph.inputs and self._readers[operand] == 1
        return alone and layout.may_overwrite(output, operand)

    @cached_property
    def _layout_of(self) -> dict[Value, Layout]:
        return {v: layout for layout in self.layouts for v in layout.graph.outputs}

    @cached_property
    def _readers(self) -> Counter[Value]:
        """How many parts read a value."""
        return Counter(v for part in self.parts for v in part.inputs)
