"""Groups grown in one pass through a program: an equation joins those that make its operands."""

from __future__ import annotations

import torch

from ...graph.ir import Equation, Graph, Value
from ...graph.operators import has_effect
from ..passes.rewrites import make
from ..reductions import Role, role
from .group import LOOKED_THROUGH, MAX_EQUATIONS, MAX_OPERANDS, Group

aten = torch.ops.aten

LARGE = 16384
"""Elements from which an operand's traffic is worth a decision."""
# Operators that our kernels run faster than ATen does even on their own.
WORTH_ALONE = {
    aten.gelu.default, aten.gelu_backward.default, aten.silu_backward.default, aten.erf.default, aten.logsumexp.default,
}  # fmt: skip


class Grower:
    """Groups in the making, one pass through the program. A bit mask for each node (an equation outside groups, or a
    group) tells on what it depends."""

    def __init__(self, graph: Graph):
        self.graph = graph
        self.all: list[Group] = []
        self.group_of: dict[Value, Group] = {}
        self.depends: list[int] = []
        self.depended_on = 0  # the nodes that others depend on
        self.node_of: dict[Value, int] = {}
        self.views: dict[Value, Equation] = {}  # views looked through, by their result
        self.effect: int | None = None  # the last node with an effect, which they all have in their order
        for eq in graph.equations:
            self._visit(eq)
        self._join_siblings()
        order = {eq: i for i, eq in enumerate(graph.equations)}
        for group in self.all:
            self._put_in_order(group, order)

    def groups(self) -> list[Group]:
        return [g for g in self.all if _worthwhile(g) and make("fuse", g.equations[-1].source, g.why())]

    def _visit(self, eq: Equation) -> None:
        if eq.op in LOOKED_THROUGH and isinstance(eq.outputs, Value):
            base = eq.args[0]
            if base in self.node_of:
                self.node_of[eq.outputs] = self.node_of[base]
            if base in self.group_of:
                self.group_of[eq.outputs] = group = self.group_of[base]
                group.values.append(eq.outputs)
                self.views[eq.outputs] = eq
            return
        mask = 0
        for v in eq.inputs:
            if v in self.node_of:
                mask |= self.depends[self.node_of[v]] | 1 << self.node_of[v]
        if has_effect(eq.op, eq.args, eq.kwargs):
            if self.effect is not None:
                mask |= self.depends[self.effect] | 1 << self.effect
            self.effect = len(self.depends)
        r = role(eq)
        group = None if r is None else self._join(eq, r)
        if group is None:
            for v in eq.results:
                self.node_of[v] = len(self.depends)
            self.depends.append(mask)
            self.depended_on |= mask
            return
        added = mask & ~(1 << group.index | self.depends[group.index])
        self.depends[group.index] |= added
        self.depended_on |= added
        for n in self._dependents(1 << group.index) if added else ():  # who now depend on all this too
            self.depends[n] |= added
        group.values += eq.results
        for v in eq.results:
            self.group_of[v], self.node_of[v] = group, group.index

    def _join(self, eq: Equation, r: Role) -> Group | None:
        """The group of an equation: joined, merged from several, or new."""
        joined: Group | None = None
        for source in dict.fromkeys(self.group_of[v] for v in eq.inputs if v in self.group_of):
            if source is joined or source not in self.all:
                continue
            together = (None, []) if joined is None else joined.joins(source)
            if together is None or self._cyclic(eq, source, joined):
                continue
            if joined is None:
                fit = source.fit(eq, r, self._kinds(eq, source))
                full = len(source.equations) >= MAX_EQUATIONS or len({*source.inputs(), *eq.inputs}) > MAX_OPERANDS
                if fit is None or full:
                    source.ended = source.ended or f"{eq.name} ({'size' if full else 'other elements or order'})"
                    continue
                joined = source
            else:
                trial = {**self._kinds(eq, joined), **self._kinds(eq, source)}
                probe = Group(0, r)
                probe.total, probe.strided = joined.total, joined.strided
                probe.columns, probe.cuts = together
                probe.reads = [*joined.reads, *source.reads]
                if probe.fit(eq, r, trial) is not None:
                    self._merge(joined, source, together)
                    fit = None
        if joined is None:
            joined = Group(len(self.depends), r)
            self.depends.append(0)
            fit = joined.fit(eq, r, {})
            if fit is None:  # rows that aren't evenly spaced, or not contiguous
                self.depends.pop()
                return None
            self.all.append(joined)
        joined.add(eq, r, fit or joined.fit(eq, r, self._kinds(eq, joined)))
        return joined

    def _kinds(self, eq: Equation, group: Group) -> dict[Value, str]:
        return {v: group.kinds[self._base(v)] for v in eq.inputs if self.group_of.get(v) is group}

    def _base(self, v: Value) -> Value:
        while v in self.views:
            v = self.views[v].args[0]
        return v

    def _cyclic(self, eq: Equation, source: Group, joined: Group | None) -> bool:
        """Would a path lead from the group through another node back to this equation?"""
        mine = 1 << source.index
        own = {source.index} if joined is None else {source.index, joined.index}
        others = [self.node_of[v] for v in eq.inputs if v in self.node_of and self.node_of[v] not in own]
        if joined is not None and (self.depends[joined.index] & mine or self.depends[source.index] >> joined.index & 1):
            return True
        return any(self.depends[n] & mine for n in others)

    def _merge(self, into: Group, other: Group, together: tuple) -> None:
        into.columns, into.cuts = together
        into.equations += other.equations
        into.kinds.update(other.kinds)
        into.reads += other.reads
        into.ended = into.ended or other.ended
        into.values += other.values
        for v in other.values:
            self.group_of[v], self.node_of[v] = into, into.index
        self.all.remove(other)
        depends, old, new = self.depends, 1 << other.index, 1 << into.index
        depends[into.index] = (depends[into.index] | depends[other.index]) & ~(old | new)
        for n in self._dependents(old | new):
            self.depended_on |= new
            if n != into.index:
                depends[n] = (depends[n] & ~old) | new | depends[into.index]

    def _dependents(self, mask: int) -> list[int]:
        """The nodes that depend on any of those in the mask."""
        return [n for n, known in enumerate(self.depends) if known & mask] if self.depended_on & mask else []

    def _join_siblings(self) -> None:
        """Groups that read one large operand and don't depend on each other read it once, together, if nothing but
        what can be fused lies between them (a result made early would be kept longer)."""
        position = {eq: i for i, eq in enumerate(self.graph.equations)}
        light = [role(eq) is not None or eq.op in LOOKED_THROUGH for eq in self.graph.equations]
        heavy_before = [0]
        for ok in light:
            heavy_before.append(heavy_before[-1] + (not ok))
        readers: dict[Value, list[Group]] = {}
        for group in self.all:
            for v in group.inputs():
                if v.fake.numel() >= LARGE:
                    readers.setdefault(v, []).append(group)
        for groups in readers.values():
            for a, b in zip(groups, groups[1:]):
                if a not in self.all or b not in self.all or a is b:
                    continue
                gap = sorted((min(position[e] for e in g.equations), max(position[e] for e in g.equations)) for g in (a, b))
                apart = heavy_before[max(gap[1][0], gap[0][1])] - heavy_before[min(gap[0][1], gap[1][0])]
                linked = self.depends[a.index] >> b.index & 1 or self.depends[b.index] >> a.index & 1
                together = None if apart or linked else a.joins(b)
                if together is not None:
                    self._merge(a, b, together)

    def _put_in_order(self, group: Group, order: dict[Equation, int]) -> None:
        """Members in the order of the program, with copies of the views that lie between them."""
        group.equations.sort(key=order.__getitem__)
        views: dict[Value, Equation] = {}
        for eq in group.equations:
            for v in eq.inputs:
                while v in self.views and self.group_of.get(v) is group:
                    views[v] = self.views[v]
                    v = self.views[v].args[0]
        group.views = sorted(views.values(), key=order.__getitem__)


def _worthwhile(group: Group) -> bool:
    if len(group.equations) > 1:
        return True
    eq = group.equations[0]
    return eq.op in WORTH_ALONE and group.total >= 4096
