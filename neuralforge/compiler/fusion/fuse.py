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
from typing import Any

import torch

from ...graph.builder import Builder
from ...graph.ir import Equation, Graph, Value, leaves, substitute
from ...graph.operators import has_effect
from ..passes.simplify import dead_code
from ..pointwise import supported
from ..reductions import role
from ..space import out_of_order
from .fused import Fused
from .group import LOOKED_THROUGH, Group
from .grower import Grower
from .sink import sink

aten = torch.ops.aten


def fuse(graph: Graph) -> Graph:
    """Replace groups of fusible equations by one equation each, whose operator is a `Fused`."""
    graph = _in_order(_constants_apart(graph))
    groups = Grower(graph).groups()
    graph = sink(graph, groups)
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
