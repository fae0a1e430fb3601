"""A fused group laid out for code: its iteration space, its equations as expressions, and the loops they run in.

A group that reduces or normalises rows goes through each row several times, while it lies in the cache: loop 0 may
compute a row's maximum, loop 1 the sum of exponentials, loop 2 the quotients. What a later loop needs again is
computed again if that is cheap, else kept in a row-long scratch buffer.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from ...graph.ir import Equation, Graph, Value
from ..pointwise import LETTERS, constant, expression, price, supported
from ..reductions import Role, role
from ..space import contiguous, cuts_of, memory_order, place, refine, sizes_of

KEEP = 6
"""Additions worth more than writing an element to a cached buffer and reading it again."""


@dataclass(eq=False)
class Node:
    """One value of the kernel: for each element, or (`row`) one for each row."""

    name: str
    t: str
    text: str
    row: bool
    operands: list[Node]
    cost: int = 0
    fold: str = ""
    """"sum", "maximum" or "minimum" of the operand over the row."""
    operand: int | None = None
    """Which of the kernel's operands it loads."""
    stage: int = 0
    """The loop in which an element's value can be computed first; the loop before which a row's is known."""
    kept: int | None = None
    """The number of its scratch buffer."""


@dataclass(eq=False)
class Result:
    """An output of the group."""

    value: Value
    kind: str
    node: Node
    strides: tuple[int, ...] = ()
    mean: bool = False
    """Divide the sum by how many were summed."""


@dataclass(eq=False)
class Loop:
    """What one pass over a row does: nodes in order, folds and sums to be accumulated, results to be stored."""

    nodes: list[Node] = field(default_factory=list)
    folds: list[Node] = field(default_factory=list)
    sums: list[Result] = field(default_factory=list)
    stores: list[Result] = field(default_factory=list)
    keeps: list[Node] = field(default_factory=list)


class Layout:
    """`operands`: (input, its strides) for every way in which an input is read; `sizes`, innermost last; `loops`, in
    order; `rows`: the nodes of a row, each with its `stage`; `results`, in the order of the graph's outputs."""

    def __init__(self, graph: Graph, columns: int | None = None):
        """`columns`: the length of the rows, in which the group is to run though none of its equations asks for it."""
        self.graph = graph
        roles = {eq: r for eq in graph.equations if (r := role(eq)) is not None}
        self.columns, self._total, self._order = space_of(roles.values())
        self.columns = columns or self.columns
        self.cuts = self._all_cuts(roles)
        self.nodes: list[Node] = []
        self.operands: list[tuple[Value, tuple[int, ...]]] = []
        self._known: dict[Value, Node] = {}
        self._loads: dict[tuple, Node] = {}
        self._ends: dict[Value, Result] = {}
        for eq in graph.equations:
            if eq in roles:
                self._lower(eq, roles[eq])
            else:  # a view of a member's result
                self._known[eq.outputs] = self._known[eq.args[0]]
        self.results = [self._result(v) for v in graph.outputs]
        self._merge()
        self.rows = [n for n in self.nodes if n.row]
        self.loops = self._schedule()

    # ---- the space

    def _all_cuts(self, roles: dict[Equation, Role]) -> list[int]:
        cuts: list[int] | None = [self.columns] if self.columns else []
        for r in roles.values():
            for more in ([r.columns] if r.columns else [], self._cuts_of(r)):
                cuts = refine(cuts, more)
                assert cuts is not None, "members of one group whose shapes don't fit together"
        return cuts

    def fits_rows(self, columns: int) -> bool:
        """Can it be laid out in rows of that length?"""
        whole = self.columns in (None, columns) and self.sizes[-1] % columns == 0
        return whole and refine([columns], self.cuts) is not None

    @property
    def in_order(self) -> bool:
        """Are its elements those of a contiguous tensor, in their order?"""
        return self._order is None

    def _cuts_of(self, r: Role) -> list[int]:
        shape = r.over.shape if self._order is None else [r.over.shape[i] for i in self._order]
        return cuts_of(shape, self._scale(r))

    def _scale(self, r: Role) -> int:
        return self._total // r.over.fake.numel()

    def _merge(self) -> None:
        """Merge neighbouring dimensions where every operand and result allows; a row stays a dimension."""
        sizes = sizes_of(self.cuts) or [1]
        places = [list(s) or [0] for s in (*(s for _, s in self.operands), *(r.strides for r in self.results))]
        outer = sum(c > (self.columns or 0) for c in self.cuts)
        for i in reversed(range(1, len(sizes))):
            if (i != outer or not self.columns) and all(p[i - 1] == p[i] * sizes[i] for p in places):
                sizes[i - 1 : i + 1] = [sizes[i - 1] * sizes[i]]
                for p in places:
                    del p[i - 1]
        self.sizes = sizes
        assert not self.columns or sizes[-1] == self.columns, "a row that isn't one dimension"
        for r, p in zip(self.results, places[len(self.operands) :]):
            r.strides = tuple(p)
        self.operands = [(v, tuple(p)) for (v, _), p in zip(self.operands, places)]

    # ---- equations to nodes

    def _node(self, text: str, t: str, operands: list[Node], row: bool | None = None, cost: int = 1) -> Node:
        if row is None:
            row = bool(self.columns) and all(n.row for n in operands)
        ready = max((n.stage for n in operands), default=0)
        node = Node(f"t{len(self.nodes)}", t, text, row, operands, cost, stage=ready)
        self.nodes.append(node)
        return node

    def _fold(self, how: str, x: Node) -> Node:
        x = self._each(x)
        node = self._node("", x.t, [x], row=True)
        node.fold, node.stage = how, x.stage + 1
        return node

    def _each(self, x: Node) -> Node:
        """A row's value as one for each of its elements."""
        return self._node(x.name, x.t, [x], row=False, cost=0) if x.row else x

    def _load(self, v: Value, r: Role) -> Node:
        """The node of an operand of a member with role `r`."""
        if v in self._known:
            return self._known[v]
        where = place(v, tuple(r.over.shape), self._order, self.cuts, self._scale(r))
        if (v, where) not in self._loads:
            inner = [s for s, c in zip(reversed(where), self.cuts) if self.columns and c <= self.columns]
            row = bool(self.columns) and not any(inner)
            node = self._node("", LETTERS[v.dtype], [], row=row, cost=1)
            node.operand = len(self.operands)
            self.operands.append((v, where))
            self._loads[v, where] = node
        return self._loads[v, where]

    def _lower(self, eq: Equation, r: Role) -> None:
        if supported(eq):
            operands: list[Node] = []

            def operand(x: Any, t: str) -> str:
                if not isinstance(x, Value):
                    return constant(t, x)
                operands.append(self._load(x, r))
                return _as(operands[-1], t)

            text = expression(eq, operand)
            row = bool(self.columns) and self._scale(r) > 1
            self._known[eq.outputs] = self._node(text, LETTERS[eq.outputs.dtype], operands, row, price(eq))
            return
        name = eq.op.overloadpacket.__name__.split(".")[-1].lstrip("_")
        LOWERINGS[name](self, eq, r)

    def bind(self, v: Value, node: Node) -> None:
        self._known[v] = node

    def end(self, v: Value, kind: str, node: Node, mean: bool = False) -> None:
        self._ends[v] = Result(v, kind, self._each(node), mean=mean)

    def mean(self, total: Node) -> Node:
        return self._node(f"({total.name} / SET_{total.t}(columns))", total.t, [total], cost=4)

    # ---- results and loops

    def _result(self, v: Value) -> Result:
        if v in self._ends:
            result = self._ends[v]
            result.strides = (0,) * len(self.cuts)
            return result
        node = self._known[v]
        begins = [1, *self.cuts][:-1][::-1]
        if node.row:
            return Result(v, "row", node, tuple(0 if n < self.columns else n // self.columns for n in begins))
        if memory_order(v) is None:  # part of a larger tensor, with gaps
            return Result(v, "full", node, place(v, tuple(v.shape), None, self.cuts))
        return Result(v, "full", node, tuple(begins))

    def _schedule(self) -> list[Loop]:
        ends: dict[Node, list[Result]] = {}
        for r in self.results:
            ends.setdefault(r.node, []).append(r)
        count = 1 + max((n.stage for n in self.nodes if not n.row), default=0)
        loops = [Loop() for _ in range(count)]
        first: dict[Node, int] = {}  # loop in which an element's value is computed first
        kept = 0
        for s, loop in enumerate(loops):
            here: set[Node] = set()

            def need(n: Node, s: int = s, here: set[Node] = here) -> None:
                nonlocal kept
                if n.row or n in here:
                    return
                here.add(n)
                if n in first and self._again(n, first) >= KEEP:
                    if n.kept is None:
                        n.kept = kept
                        kept += 1
                        loops[first[n]].keeps.append(n)
                    return
                first.setdefault(n, s)
                for x in n.operands:
                    need(x)

            for n in self.nodes:
                if n.fold and n.operands[0].stage == s:
                    need(n.operands[0])
                    loop.folds.append(n)
            for n, results in ends.items():
                if not n.row and n.stage == s:
                    need(n)
                    loop.sums += [r for r in results if r.kind in ("all", "column")]
                    loop.stores += [r for r in results if r.kind == "full"]
            loop.nodes = [n for n in self.nodes if n in here]
        self.kept = kept
        self.first = first
        return loops

    def _again(self, n: Node, first: dict[Node, int]) -> int:
        """What computing an element's value again costs."""
        if n.row or n.kept is not None:
            return 0 if n.row else 1
        return n.cost + sum(self._again(x, first) for x in n.operands)

    def inner(self, strides: tuple[int, ...]) -> int:
        """Stride of the innermost dimension: 0 broadcast, 1 contiguous, 2 for any other."""
        return min(abs(strides[-1]), 2)

    def may_overwrite(self, output: Value, operand: Value) -> bool:
        """May `output` be put where `operand` is? Each element must be read for the last time before it is written."""
        r = next((r for r in self.results if r.value is output), None)
        if r is None:  # computed a second time, under another name
            return False
        places = {i for i, (v, _) in enumerate(self.operands) if v is operand}
        if r.kind not in ("full", "row") or any(self.operands[i][1] != r.strides for i in places):
            return False
        if r.kind == "row":
            return all(n.row for n in self.nodes if n.operand in places)
        last = max((s for s, loop in enumerate(self.loops) for n in loop.nodes if n.operand in places), default=0)
        return r.node.stage >= last


def _as(n: Node, t: str) -> str:
    return n.name if n.t == t else f"{t}_from_{n.t}({n.name})"


def space_of(roles: Any) -> tuple[int | None, int, tuple[int, ...] | None]:
    """Row length, number of elements, and order of the dimensions (None: contiguous) that members have in common."""
    roles = list(roles)
    columns = next((r.columns for r in roles if r.columns), None)
    widest = max(roles, key=lambda r: r.over.fake.numel()).over
    return columns, widest.fake.numel(), None if contiguous(widest) else memory_order(widest)


# ---- operators that aren't elementwise


def _sum(mean: bool) -> Callable:
    def lower(self: Layout, eq: Equation, r: Role) -> None:
        x = self._load(eq.args[0], r)
        if r.results[0] != "row":
            self.end(eq.outputs, r.results[0], x, mean)
            return
        total = self._fold("sum", x)
        self.bind(eq.outputs, self.mean(total) if mean else total)

    return lower


def _extremum(how: str) -> Callable:
    def lower(self: Layout, eq: Equation, r: Role) -> None:
        self.bind(eq.outputs, self._fold(how, self._load(eq.args[0], r)))

    return lower


def _exponentials(self: Layout, x: Node, highest: Node) -> tuple[Node, Node, Node]:
    """x less the row's maximum, its exponential, and the sum of those."""
    shifted = self._node(f"({x.name} - {highest.name})", x.t, [x, highest])
    e = self._node(f"exp_{x.t}({shifted.name})", x.t, [shifted], cost=8)
    return shifted, e, self._fold("sum", e)


def _softmax(self: Layout, eq: Equation, r: Role) -> None:
    x = self._load(eq.args[0], r)
    _, e, total = _exponentials(self, x, self._fold("maximum", x))
    share = self._node(f"(SET_{x.t}(1) / {total.name})", x.t, [total], cost=4)
    self.bind(eq.outputs, self._node(f"({e.name} * {share.name})", x.t, [e, share]))


def _log_softmax(self: Layout, eq: Equation, r: Role) -> None:
    x = self._load(eq.args[0], r)
    shifted, _, total = _exponentials(self, x, self._fold("maximum", x))
    log = self._node(f"log_{x.t}({total.name})", x.t, [total], cost=8)
    self.bind(eq.outputs, self._node(f"({shifted.name} - {log.name})", x.t, [shifted, log]))


def _logsumexp(self: Layout, eq: Equation, r: Role) -> None:
    x = self._load(eq.args[0], r)
    m, t = self._fold("maximum", x), x.t
    infinite = f"MASK_{t}(abs_{t}({m.name}) == SET_{t}(__builtin_inf()))"
    shift = self._node(f"SELECT_{t}({infinite}, SET_{t}(0), {m.name})", t, [m])
    _, _, total = _exponentials(self, x, shift)
    self.bind(eq.outputs, self._node(f"(log_{t}({total.name}) + {shift.name})", t, [total, shift], cost=8))


def _softmax_backward(self: Layout, eq: Equation, r: Role) -> None:
    g, y = self._load(eq.args[0], r), self._load(eq.args[1], r)
    total = self._fold("sum", self._node(f"({g.name} * {y.name})", g.t, [g, y]))
    self.bind(eq.outputs, self._node(f"({y.name} * ({g.name} - {total.name}))", g.t, [y, g, total], cost=2))


def _log_softmax_backward(self: Layout, eq: Equation, r: Role) -> None:
    g, y = self._load(eq.args[0], r), self._load(eq.args[1], r)
    total = self._fold("sum", g)
    self.bind(eq.outputs, self._node(f"({g.name} - exp_{g.t}({y.name}) * {total.name})", g.t, [g, y, total], cost=10))


def _variance(self: Layout, x: Node, less: Any = 0) -> tuple[Node, Node, Node]:
    """The row's mean, the distances from it, and their mean square (with `less` degrees of freedom less)."""
    mean = self.mean(self._fold("sum", x))
    off = self._node(f"({x.name} - {mean.name})", x.t, [x, mean])
    total = self._fold("sum", self._node(f"({off.name} * {off.name})", x.t, [off]))
    count = f"(columns > {less!r} ? columns - {less!r} : 0)" if less else "columns"
    return mean, off, self._node(f"({total.name} / SET_{x.t}({count}))", x.t, [total], cost=4)


def _var(self: Layout, eq: Equation, r: Role) -> None:
    correction = eq.kwargs.get("correction")
    self.bind(eq.outputs, _variance(self, self._load(eq.args[0], r), 1 if correction is None else correction)[2])


def _layer_norm(self: Layout, eq: Equation, r: Role) -> None:
    x, _, weight, bias, eps = eq.args
    x = self._load(x, r)
    mean, off, variance = _variance(self, x)
    rstd = self._node(f"(SET_{x.t}(1) / sqrt_{x.t}({variance.name} + {constant(x.t, eps)}))", x.t, [variance], cost=8)
    y = self._node(f"({off.name} * {rstd.name})", x.t, [off, rstd])
    for other, symbol in ((weight, "*"), (bias, "+")):
        if other is not None:
            w = self._load(other, r)
            y = self._node(f"({y.name} {symbol} {_as(w, x.t)})", x.t, [y, w])
    for v, node in zip(eq.outputs, (y, mean, rstd)):
        self.bind(v, node)


def _layer_norm_backward(self: Layout, eq: Equation, r: Role) -> None:
    g, x, _, mean, rstd, weight, _, _ = eq.args
    g, x, mean, rstd = (self._load(v, r) for v in (g, x, mean, rstd))
    t = g.t
    normal = self._node(f"(({x.name} - {mean.name}) * {rstd.name})", t, [x, mean, rstd], cost=2)
    gw = g
    if weight is not None:
        w = self._load(weight, r)
        gw = self._node(f"({g.name} * {_as(w, t)})", t, [g, w])
    first = self.mean(self._fold("sum", gw))
    second = self.mean(self._fold("sum", self._node(f"({gw.name} * {normal.name})", t, [gw, normal])))
    text = f"({rstd.name} * ({gw.name} - {first.name} - {normal.name} * {second.name}))"
    dx, dw, db = eq.outputs
    self.bind(dx, self._node(text, t, [rstd, gw, first, normal, second], cost=4))
    if isinstance(dw, Value):
        self.end(dw, "column", self._node(f"({g.name} * {normal.name})", t, [g, normal]))
    if isinstance(db, Value):
        self.end(db, "column", g)


LOWERINGS: dict[str, Callable[[Layout, Equation, Role], None]] = {
    "sum": _sum(False), "mean": _sum(True), "amax": _extremum("maximum"), "amin": _extremum("minimum"),
    "softmax": _softmax, "log_softmax": _log_softmax, "logsumexp": _logsumexp, "var": _var,
    "softmax_backward_data": _softmax_backward, "log_softmax_backward_data": _log_softmax_backward,
    "native_layer_norm": _layer_norm, "native_layer_norm_backward": _layer_norm_backward,
}  # fmt: skip
"""For each operator, what adds its nodes to a layout."""
