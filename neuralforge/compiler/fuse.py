"""Fusion: chains of elementwise operators with the reductions among them become one equation each.

An equation joins the groups that make its operands if they run over the same elements in the same order and no path
leads from the group out and back in. Members are elementwise operators on all elements, or on one value for each row
of a group that reduces rows; reductions of rows, whose results go on being used in the group; and sums of everything
or of columns, which end there. Views in between are looked through. Groups that read the same large operand are
joined too. A cheap result that only other groups read is computed there again rather than stored.
"""

from __future__ import annotations

import heapq
import itertools
from collections import Counter
from copy import copy
from functools import cached_property
from typing import Any

import torch

from ..graph.builder import Builder
from ..graph.ir import Equation, Graph, Value, leaves, substitute
from ..graph.operators import has_effect
from .joined import Joined
from .layout import Layout
from .passes.rewrites import make
from .passes.simplify import dead_code
from .pointwise import supported
from .reductions import Role, role
from .sink import sink
from .space import contiguous, cuts_of, out_of_order, place, refine, sizes_of, squash

aten = torch.ops.aten

MAX_OPERANDS = 24
MAX_EQUATIONS = 96
LARGE = 16384
"""Elements from which an operand's traffic is worth a decision."""
# Operators that our kernels run faster than ATen does even on their own.
WORTH_ALONE = {
    aten.gelu.default, aten.gelu_backward.default, aten.silu_backward.default, aten.erf.default, aten.logsumexp.default,
}  # fmt: skip
LOOKED_THROUGH = {
    aten.view.default, aten._unsafe_view.default, aten.unsqueeze.default, aten.squeeze.dim, aten.squeeze.dims,
    aten.squeeze.default, aten.expand.default, aten.alias.default, aten.detach.default,
}  # fmt: skip
"""Views that keep the order of the elements (or repeat them)."""


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


def fuse(graph: Graph) -> Graph:
    """Replace groups of fusible equations by one equation each, whose operator is a `Fused`."""
    graph = _in_order(_constants_apart(graph))
    groups = _Grower(graph).groups()
    graph = sink(graph, groups, LOOKED_THROUGH)
    groups = [group for group in groups if group.equations]
    members = {eq: group for group in groups for eq in group.equations}
    used_outside = _escaping(graph, members)
    emitted: list[Equation] = []
    for node in _ordered(graph, members):
        emitted.append(node if isinstance(node, Equation) else _fused_equation(node, used_outside))
    return dead_code(graph.replace(equations=emitted))


def _constants_apart(graph: Graph) -> Graph:
    """Give every fusible reader of a filled tensor one of its own: what else reads it, in another layer perhaps, would
    be drawn into one group by it."""
    names = itertools.count()
    filled = {eq.outputs: eq for eq in graph.equations if eq.op is aten.full.default and role(eq) is not None}
    if not filled:
        return graph
    equations: list[Equation] = []
    for eq in graph.equations:
        env = {}
        for v in dict.fromkeys(v for v in eq.inputs if v in filled and role(eq) is not None):
            fill, env[v] = filled[v], Value(f"{v.name}_own{next(names)}", v.fake)
            equations.append(Equation(fill.op, fill.args, fill.kwargs, env[v], fill.source, fill.origin))
        equations.append(eq.reading(env))
    return dead_code(graph.replace(equations=equations))


def _in_order(graph: Graph) -> Graph:
    """Operands that lie in memory in another order than what is made of them, copied: PyTorch's copy goes through both block by block, a group's
    code through one of them number by number."""
    builder, copies = Builder(graph), {}
    for eq in graph.equations:
        y = eq.outputs
        turned = [x for x in eq.inputs if out_of_order(x, y)] if isinstance(y, Value) else []
        if not turned or not supported(eq):
            builder.equations.append(eq)
            continue
        for x in turned:
            if x not in copies:
                made = {"memory_format": torch.contiguous_format, "source": eq.source, "origin": "fuse"}
                copies[x] = builder.emit(aten.clone.default, x, **made)
        builder.equations.append(eq.reading({x: copies[x] for x in turned}))
    return graph.replace(equations=builder.equations)


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


class _Grower:
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


def _escaping(graph: Graph, members: dict[Equation, Group]) -> set[Value]:
    """Values read outside the group that makes them. A view counts as a reader if anybody outside reads it."""
    found = set(leaves(graph.outputs))
    maker = {v: group for eq, group in members.items() for v in eq.results}
    for eq in reversed(graph.equations):
        home = members.get(eq)
        if eq.op in LOOKED_THROUGH and not any(v in found for v in eq.results):
            continue
        inside = {v for view in home.views for v in view.results} if home else set()
        found.update(v for v in eq.inputs if v not in inside and (v not in maker or maker[v] is not home))
    return found


def _ordered(graph: Graph, members: dict[Equation, Group]) -> list[Any]:
    """Equations and groups in an order that respects dependencies, and that of effects: earliest first, a group
    counting as its last member."""
    node_of: dict[Value, Any] = {}
    position: dict[Any, int] = {}
    for i, eq in enumerate(graph.equations):
        node = members.get(eq, eq)
        position[node] = i
        for v in eq.results:
            node_of[v] = node
    effects = [eq for eq in graph.equations if has_effect(eq.op, eq.args, eq.kwargs)]
    effect_before = dict(zip(effects[1:], effects))
    waiting = dict.fromkeys(position, 0)
    followers: dict[Any, list] = {node: [] for node in position}
    for node in position:
        inputs = node.inputs if isinstance(node, Equation) else node.inputs()
        earlier = {node_of[v] for v in inputs if v in node_of} - {node}
        if node in effect_before:
            earlier.add(effect_before[node])
        for before in earlier:
            followers[before].append(node)
            waiting[node] += 1
    ready = [(position[node], id(node), node) for node, count in waiting.items() if count == 0]
    heapq.heapify(ready)
    result = []
    while ready:
        _, _, node = heapq.heappop(ready)
        result.append(node)
        for after in followers[node]:
            waiting[after] -= 1
            if waiting[after] == 0:
                heapq.heappush(ready, (position[after], id(after), after))
    assert len(result) == len(position), "fusion made a cycle"
    return result


def _fused_equation(group: Group, used_outside: set[Value]) -> Equation:
    inputs = group.inputs()
    outputs = [v for eq in group.equations for v in eq.results if v in used_outside]
    env: dict[Value, Value] = {}
    equations: list[Equation] = []
    views = {eq.outputs: eq for eq in group.views}

    def inside(v: Value) -> None:
        """A copy of a view, under a name of the group's own."""
        if v in views and v not in env:
            view = views[v]
            inside(view.args[0])
            env[v] = Value(f"{v}_in_group", v.fake)
            equations.append(Equation(view.op, substitute(view.args, env), view.kwargs, env[v], view.source, view.origin))

    for eq in group.equations:
        for v in eq.inputs:
            inside(v)
        equations.append(eq.reading(env))
    inner = Graph(inputs=inputs, equations=equations, outputs=list(outputs))
    last = group.equations[-1]
    return Equation(Fused([inner], group.why()), tuple(inputs), {}, tuple(outputs), last.source, "fuse")
