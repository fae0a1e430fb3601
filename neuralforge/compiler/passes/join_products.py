"""Sums of products x^T y, as one product of the rows of all x and of all y: the gradient of a weight that a recurrence applies at each
step, or that several short batches share.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch

from ...graph.builder import Builder
from ...graph.ir import Equation, Graph, Value
from ..space import contiguous, dimension
from .dataflow import Dataflow
from .parts import terms_of
from .rewrites import make
from .simplify import dead_code

aten = torch.ops.aten
TRANSPOSES = (aten.t.default, aten.transpose.int, aten.permute.default)


class _Sum(NamedTuple):
    """The products' factors, x and y, and the other terms."""

    factors: list[tuple[Value, Value]]
    rest: list[Value]


def join_products(graph: Graph) -> Graph:
    """Where copying the factors together takes less memory than writing all products but one, and reading them to add them up."""
    if sum(eq.op is aten.mm.default for eq in graph.equations) < 2:
        return graph
    flow = Dataflow(graph)
    sums: dict[Equation, _Sum] = {}
    inside: set[Equation] = set()  # of a larger sum
    for eq in reversed(graph.equations):
        if eq.op is aten.add.Tensor and not eq.kwargs and eq not in inside:
            terms, adds = terms_of(flow, eq)
            inside |= adds
            found = [_factors(flow, v) for v in terms]
            pairs = [pair for pair in found if pair]
            copied, saved = sum(v.fake.numel() for pair in pairs for v in pair), (len(pairs) - 1) * eq.outputs.fake.numel()
            if copied < saved and all(len(set(side)) == len(pairs) for side in zip(*pairs)):
                if make("join_products", eq.source, f"{len(pairs)} products of {tuple(eq.outputs.shape)} added up"):
                    sums[eq] = _Sum(pairs, [v for v, pair in zip(terms, found) if not pair])
    return _joined(graph, flow, sums) if sums else graph


def _factors(flow: Dataflow, v: Value) -> tuple[Value, Value] | None:
    """x and y, if `v`, which nothing but the sum reads, is their product x^T y."""
    product = flow.producers.get(v)
    if product is None or product.op is not aten.mm.default or v in flow.results or len(flow.users[v]) > 1:
        return None
    turned, y = flow.producers.get(product.args[0]), product.args[1]
    if turned is None or turned.op not in TRANSPOSES or turned.args[0].fake.dim() != 2:
        return None
    x = turned.args[0]
    return (x, y) if turned.outputs.strides == x.strides[::-1] and contiguous(x) and contiguous(y) else None


def _joined(graph: Graph, flow: Dataflow, sums: dict[Equation, _Sum]) -> Graph:
    stacks = {key: eq for eq in graph.equations if (key := _stacked(flow, eq)) is not None}
    builder = Builder(graph)
    instead: dict[Equation, Value] = {}  # a concatenation of the same parts was made before

    def together(parts: list[Value], at: int, made: dict[str, str]) -> Value:
        stack = stacks.get(_wholes(flow, parts))
        if stack in instead:
            return instead[stack]
        rows = [sum(v.shape[0] for v in parts), parts[0].shape[1]]
        if stack is not None and flow.position[stack] < at:
            return builder.emit(aten.view.default, stack.outputs, rows, **made)
        whole = builder.emit(aten.cat.default, parts, **made)
        if stack is not None:
            instead[stack] = whole
        return whole

    for at, eq in enumerate(graph.equations):
        if eq in instead:
            builder.equations.append(Equation(aten.view.default, (instead[eq], list(eq.outputs.shape)), {}, eq.outputs, eq.source, eq.origin))
        elif eq in sums:
            made = {"source": eq.source, "origin": eq.origin or "join_products"}
            factors, rest = sums[eq]
            if _wholes(flow, [x for x, _ in reversed(factors)]) in stacks:
                factors = factors[::-1]
            x, y = (together(list(parts), at, made) for parts in zip(*factors))
            op, args = aten.mm.default, (builder.emit(aten.t.default, x, **made), y)
            for other in rest:
                op, args = aten.add.Tensor, (builder.emit(op, *args, **made), other)
            builder.equations.append(Equation(op, args, {}, eq.outputs, eq.source, made["origin"]))
        else:
            builder.equations.append(eq)
    return dead_code(graph.replace(equations=builder.equations))


def _stacked(flow: Dataflow, eq: Equation) -> tuple[Value, ...] | None:
    """What a contiguous concatenation has one after the other in memory."""
    if eq.op is not aten.cat.default or dimension(eq) != 0 or not contiguous(eq.outputs) or not all(map(contiguous, eq.args[0])):
        return None
    return _wholes(flow, eq.args[0])


def _wholes(flow: Dataflow, parts: Iterable[Value]) -> tuple[Value, ...]:
    """The parts, by what they are all of where they are views."""
    return tuple(flow.whole(v) or v for v in parts)
