"""A group of elementwise operators and reductions in the making: what may join it, and what it reads and makes."""

from __future__ import annotations

from copy import copy

import torch

from ...graph.ir import Equation, Value
from ..reductions import Role, role
from ..space import contiguous, cuts_of, place, refine, sizes_of, squash

aten = torch.ops.aten

MAX_OPERANDS = 24
MAX_EQUATIONS = 96
LOOKED_THROUGH = {
    aten.view.default, aten._unsafe_view.default, aten.unsqueeze.default, aten.squeeze.dim, aten.squeeze.dims,
    aten.squeeze.default, aten.expand.default, aten.alias.default, aten.detach.default,
}  # fmt: skip
"""Views that keep the order of the elements (or repeat them)."""


class Group:
    """Equations in the making of a kernel. The elements are known by their number and, unless contiguous, by shape
    and strides; `kinds` tells of each result what it is (see `Role`), `reads` how operands are read."""

    def __init__(self, index: int, r: Role):
        self.index = index
        self.total = r.over.fake.numel()
        self.strided = None if contiguous(r.over) else (tuple(r.over.shape), tuple(r.over.strides))
        self.columns: int | None = None
        self.cuts: list[int] = []
        self.equations: list[Equation] = []
        self.values: list[Value] = []  # that are known to be its own, views of them included
        self.views: list[Equation] = []
        self.kinds: dict[Value, str] = {}
        self.reads: list[tuple[Value, tuple[int, ...], int]] = []
        self.ended = ""

    def inputs(self) -> list[Value]:
        made = {v for eq in (*self.views, *self.equations) for v in eq.results}
        return [v for v in dict.fromkeys(v for eq in self.equations for v in eq.inputs) if v not in made]

    def why(self) -> str:
        """How the group came about and what ended it."""
        why = f"{len(self.equations)} operators over {self.total} elements"
        why += f" in rows of {self.columns}" if self.columns else ""
        return why + (f"; ended by {self.ended}" if self.ended else "")

    def fit(self, eq: Equation, r: Role, kinds: dict[Value, str]) -> tuple | None:
        """What joining would change (row length, cuts, reads), or None if the equation can't join. `kinds` are those
        of its operands that the group makes."""
        n = r.over.fake.numel()
        if self.strided is not None:
            same = (tuple(r.over.shape), tuple(r.over.strides)) == self.strided
            return (None, [], []) if same and not r.columns and set(kinds.values()) <= {"full"} else None
        if not contiguous(r.over) or "end" in kinds.values():
            return None
        columns = self.columns or r.columns
        if n == self.total:
            scale = 1
            if r.columns not in (None, columns):
                return None
        elif columns and not r.columns and n * columns == self.total and r.results == ("full",):
            scale = columns
        else:
            return None
        cuts = refine(refine(self.cuts, [columns] if columns else []) or [], cuts_of(r.over.shape, scale))
        if cuts is None or (columns and columns not in cuts):
            return None
        reads = [(v, tuple(r.over.shape), scale) for v in dict.fromkeys(eq.inputs)]
        for v, shape, _ in reads:
            if v in kinds and not self._in_step(v, kinds[v], shape, cuts, scale, columns):
                return None
        known = () if (columns, cuts) == (self.columns, self.cuts) else self.reads  # else they have been looked at
        if columns and not all(_one_dimension(v, shape, cuts, s, columns) for v, shape, s in (*known, *reads)):
            return None
        return columns, cuts, reads

    def _in_step(self, v: Value, kind: str, shape: tuple, cuts: list[int], scale: int, columns: int | None) -> bool:
        """Does an operand made in the group lie, as it is read, where the group has it?"""
        sizes = sizes_of(cuts)
        found = [(n, s) for n, s in squash(sizes, place(v, shape, None, cuts, scale)) if n != 1]
        if kind == "full":
            return scale == 1 and found == ([(self.total, 1)] if self.total > 1 else [])
        rows = self.total // columns if columns else 0
        return found == [(rows, 1), (columns, 0)]

    def add(self, eq: Equation, r: Role, fit: tuple) -> None:
        self.columns, self.cuts = fit[0], fit[1]
        self.reads += fit[2]
        self.equations.append(eq)
        row = r.over.fake.numel() < self.total
        for v, kind in zip(eq.results, r.results):
            self.kinds[v] = "row" if row else kind if kind in ("full", "row") else "end"

    def rebuilt(self, equations: list[Equation], views: list[Equation]) -> Group | None:
        """A group over the same elements with other members; None if they don't fit together."""
        new = copy(self)
        new.equations, new.views, new.cuts, new.kinds, new.reads = [], views, [], {}, []
        base = {view.outputs: view.args[0] for view in views}
        for eq in equations:
            kinds = {}
            for v in eq.inputs:
                source = v
                while source in base:
                    source = base[source]
                if source in new.kinds:
                    kinds[v] = new.kinds[source]
            r = role(eq)
            fit = new.fit(eq, r, kinds)
            if fit is None:
                return None
            new.add(eq, r, fit)
        return new if len(new.inputs()) <= MAX_OPERANDS else None

    def take(self, other: Group) -> None:
        """Become the other group."""
        self.__dict__.update(other.__dict__)

    def joins(self, other: Group) -> tuple | None:
        """What the two together would have, or None if they don't go together."""
        if (self.total, self.strided) != (other.total, other.strided):
            return None
        if self.columns and other.columns and self.columns != other.columns:
            return None
        columns = self.columns or other.columns
        cuts = refine(refine(self.cuts, other.cuts) or [], [columns] if columns else [])
        if cuts is None or (self.cuts or other.cuts) and not cuts:
            return None
        if columns and not all(_one_dimension(v, s, cuts, k, columns) for v, s, k in (*self.reads, *other.reads)):
            return None
        size = len(self.equations) + len(other.equations)
        if size > MAX_EQUATIONS or len(dict.fromkeys([*self.inputs(), *other.inputs()])) > MAX_OPERANDS:
            return None
        return columns, cuts


def _one_dimension(v: Value, shape: tuple, cuts: list[int], scale: int, columns: int) -> bool:
    """Are the operand's elements along a row evenly spaced?"""
    inside = [c for c in cuts if c <= columns]
    strides = place(v, shape, None, cuts, scale)[len(cuts) - len(inside) :]
    return len(squash(sizes_of(inside), strides)) <= 1
