"""Fusion: chains of elementwise operators, with the sums at their ends, become one equation each.

An equation joins the groups that make its operands if they run over the same elements (same shape, same layout) and
no path leads from the group out and back in. Groups are then put in order by their last member. What a group computes
for itself alone never reaches memory; an operand may be broadcast or strided.
"""

from __future__ import annotations

import heapq
from typing import Any

import torch

from ..graph.ir import Equation, Graph, Value, leaves
from .pointwise import supported

aten = torch.ops.aten

MAX_OPERANDS = 24
MAX_EQUATIONS = 96
# Operators that our kernels run faster than ATen does even on their own.
WORTH_ALONE = {aten.gelu.default, aten.gelu_backward.default, aten.silu_backward.default}


class Fused:
    """The operator of one or more groups of equal structure: called, it interprets `graph`; `codegen` builds native
    code that runs all `parts` at once."""

    def __init__(self, parts: list[Graph]):
        self.parts = parts
        self.graph = Graph(
            inputs=list(dict.fromkeys(v for part in parts for v in part.inputs)),
            equations=[eq for part in parts for eq in part.equations],
            outputs=[v for part in parts for v in part.outputs],
        )
        names = [eq.op.overloadpacket.__name__.split(".")[-1].lstrip("_") for eq in parts[0].equations]
        short = list(dict.fromkeys(names))
        self.name = "fused_" + "_".join(short[:5]) + (f"_and_{len(names) - 5}" if len(names) > 5 else "")
        if len(parts) > 1:
            self.name += f"_x{len(parts)}"

    def __call__(self, *tensors: torch.Tensor) -> tuple:
        return tuple(self.graph(*tensors))

    def may_overwrite(self, output: Value, operand: Value) -> bool:
        """May `output` be put where `operand` (of the same type, read for the last time) is? Within one part an
        element is read before it is written; parts run side by side."""
        part = next((part for part in self.parts if output in part.outputs), None)
        if part is None:  # computed a second time, under other names
            return False
        return operand in part.inputs and sum(operand in other.inputs for other in self.parts) == 1


def fuse(graph: Graph) -> Graph:
    """Replace groups of fusible equations by one equation each, whose operator is a `Fused`."""
    groups = _grow(graph)
    members = {eq: group for group in groups for eq in group.equations}
    used_outside = _escaping(graph, members)
    emitted: list[Equation] = []
    for node in _ordered(graph, members):
        if isinstance(node, Equation):
            emitted.append(node)
        else:
            emitted.append(_fused_equation(node, used_outside))
    return graph.replace(equations=emitted)


class _Group:
    __slots__ = ("equations", "shape", "strides", "index", "results", "sums")

    def __init__(self, index: int, shape: tuple, strides: tuple):
        self.index = index
        self.shape, self.strides = shape, strides
        self.equations: list[Equation] = []
        self.results: set[Value] = set()
        self.sums: set[Value] = set()

    def inputs(self) -> list[Value]:
        return [v for v in dict.fromkeys(v for eq in self.equations for v in eq.inputs) if v not in self.results]


def _space(eq: Equation) -> tuple[tuple, tuple] | None:
    """Shape and strides of the elements that a fusible equation runs over; None if it can't be fused."""
    if not supported(eq):
        return None
    over = eq.args[0] if eq.op is aten.sum.default else eq.outputs
    return tuple(over.shape), tuple(over.strides)


def _grow(graph: Graph) -> list[_Group]:
    """Groups in the making, one pass through the program. A bit mask for each node tells on what it depends."""
    groups: list[_Group] = []
    group_of: dict[Value, _Group] = {}
    depends: list[int] = []  # of the node: every equation outside groups, every group
    node_of: dict[Value, int] = {}

    for eq in graph.equations:
        mask = 0
        for v in eq.inputs:
            if v in node_of:
                mask |= depends[node_of[v]] | 1 << node_of[v]
        space = _space(eq)
        joined = None
        if space is not None:
            for source in dict.fromkeys(group_of[v] for v in eq.inputs if v in group_of):
                if (source.shape, source.strides) != space or source is joined:
                    continue
                if any(v in source.sums for v in eq.inputs):
                    continue
                mine = 1 << source.index
                # A path from the group through another node back to this equation would become a cycle.
                others = [node_of[v] for v in eq.inputs if v in node_of and node_of[v] != source.index]
                if joined is not None:
                    others = [n for n in others if n != joined.index]
                    cyclic = depends[joined.index] & mine or depends[source.index] & 1 << joined.index
                else:
                    cyclic = False
                if cyclic or any(depends[n] & mine for n in others):
                    continue
                size = len(source.equations) + (len(joined.equations) if joined else 0)
                if size >= MAX_EQUATIONS or len(source.inputs()) + (len(joined.inputs()) if joined else 0) > MAX_OPERANDS:
                    continue
                if joined is None:
                    joined = source
                else:
                    _merge(joined, source, depends, node_of, group_of)
                    groups.remove(source)
        if space is not None and joined is None:
            joined = _Group(len(depends), *space)
            depends.append(0)
            groups.append(joined)
        if joined is not None:
            index = joined.index
            joined.equations.append(eq)
            joined.results.update(eq.results)
            if eq.op is aten.sum.default:
                joined.sums.update(eq.results)
            own = 1 << index
            added = mask & ~own
            depends[index] |= added
            for n, known in enumerate(depends):  # whoever depends on the group now depends on all this too
                if known & own:
                    depends[n] |= added
            for v in eq.results:
                group_of[v], node_of[v] = joined, index
        else:
            for v in eq.results:
                node_of[v] = len(depends)
            depends.append(mask)
    order = {eq: i for i, eq in enumerate(graph.equations)}
    for group in groups:
        group.equations.sort(key=order.__getitem__)
    return [g for g in groups if _worthwhile(g)]


def _merge(into: _Group, other: _Group, depends: list[int], node_of: dict, group_of: dict) -> None:
    into.equations += other.equations
    into.results |= other.results
    into.sums |= other.sums
    for v in other.results:
        group_of[v], node_of[v] = into, into.index
    old, new = 1 << other.index, 1 << into.index
    depends[into.index] = (depends[into.index] | depends[other.index]) & ~(old | new)
    for n, known in enumerate(depends):
        if known & (old | new) and n != into.index:
            depends[n] = (known & ~old) | new | depends[into.index]


def _worthwhile(group: _Group) -> bool:
    if len(group.equations) > 1:
        return True
    eq = group.equations[0]
    return eq.op in WORTH_ALONE and eq.outputs.fake.numel() >= 4096


def _escaping(graph: Graph, members: dict[Equation, _Group]) -> set[Value]:
    """Values read outside the group that makes them."""
    found = set(leaves(graph.outputs))
    maker = {v: group for eq, group in members.items() for v in eq.results}
    for eq in graph.equations:
        home = members.get(eq)
        found.update(v for v in eq.inputs if v in maker and maker[v] is not home)
    return found


def _ordered(graph: Graph, members: dict[Equation, _Group]) -> list[Any]:
    """Equations and groups in an order that respects dependencies: earliest first, a group counting as its last
    member."""
    node_of: dict[Value, Any] = {}
    position: dict[Any, int] = {}
    for i, eq in enumerate(graph.equations):
        node = members.get(eq, eq)
        position[node] = i
        for v in eq.results:
            node_of[v] = node
    waiting = dict.fromkeys(position, 0)
    followers: dict[Any, list] = {node: [] for node in position}
    for node in position:
        inputs = node.inputs if isinstance(node, Equation) else node.inputs()
        for before in {node_of[v] for v in inputs if v in node_of} - {node}:
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


def _fused_equation(group: _Group, used_outside: set[Value]) -> Equation:
    inputs = group.inputs()
    outputs = [v for eq in group.equations for v in eq.results if v in used_outside]
    inner = Graph(inputs=inputs, equations=group.equations, outputs=list(outputs))
    last = group.equations[-1]
    return Equation(Fused([inner]), tuple(inputs), {}, tuple(outputs), last.source, "fuse")
