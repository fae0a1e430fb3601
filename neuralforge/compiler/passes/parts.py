"""What is put together of parts: sums of gradients of parts, and stacks, as concatenations, which nothing copies where the parts
can be written into their places."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from ...graph.builder import Builder
from ...graph.ir import Equation, Graph, Value
from .patterns import Program
from .simplify import dead_code
from .views import natural

aten = torch.ops.aten


class _Part(NamedTuple):
    """The gradient of a part, from place `start` of dimension `dim` on; without that dimension if it was one place selected."""

    gradient: Value
    shape: tuple[int, ...]
    dim: int
    start: int
    selected: bool

    @property
    def size(self) -> int:
        return 1 if self.selected else self.gradient.shape[self.dim]


def join_gradients(graph: Graph) -> Graph:
    """Sums of gradients that are zero but for their parts of a tensor, all of it: the parts side by side. (`x[0]`, `x[1]` and
    `x[2]` have such gradients.)"""
    if not any(eq.op in (aten.select_backward.default, aten.slice_backward.default) for eq in graph.equations):
        return graph
    program, builder = Program(graph), Builder(graph)
    inside: set[Equation] = set()  # of a larger sum that is joined
    joined: dict[Equation, tuple[list[list[_Part]], list[Value]]] = {}
    for eq in reversed(graph.equations):
        if eq.op is aten.add.Tensor and not eq.kwargs and eq not in inside:
            terms, adds = _terms(program, eq)
            wholes, rest = _wholes({v: _part(program.producers.get(v)) for v in terms}, terms)
            if wholes:
                joined[eq] = wholes, rest
                inside |= adds
    for eq in graph.equations:
        if eq in joined:
            _emit_sum(builder, eq, *joined[eq])
        else:
            builder.equations.append(eq)
    return dead_code(graph.replace(equations=builder.equations)) if joined else graph


def _terms(program: Program, eq: Equation) -> tuple[list[Value], set[Equation]]:
    """What is added up, by `eq` and by additions whose results are read by that alone."""
    terms, adds, todo = [], {eq}, list(eq.args[::-1])
    while todo:
        v = todo.pop()
        maker = program.producers.get(v) if isinstance(v, Value) and v.shape == eq.outputs.shape else None
        if maker is not None and maker.op is aten.add.Tensor and not maker.kwargs and len(program.users[v]) == 1 and v not in program.results:
            adds.add(maker)
            todo += maker.args[::-1]
        else:
            terms.append(v)
    return terms, adds


def _part(eq: Equation | None) -> _Part | None:
    if eq is None or eq.op not in (aten.select_backward.default, aten.slice_backward.default):
        return None
    gradient, shape, dim, start, *more = eq.args
    dim = dim % len(shape)
    start = max(start + shape[dim], 0) if start < 0 else min(start, shape[dim])
    if eq.op is aten.slice_backward.default and more[1] != 1:
        return None
    return _Part(gradient, tuple(shape), dim, start, eq.op is aten.select_backward.default)


def _wholes(parts: dict[Value, _Part | None], terms: list[Value]) -> tuple[list[list[_Part]], list[Value]]:
    """Parts, in order, that are all of a tensor together, and the terms beside them."""
    wholes, rest = [], list(terms)
    for first in [v for v in terms if parts[v] is not None and parts[v].start == 0]:
        chosen, at, (_, shape, dim, _, _) = [], 0, parts[first]
        alike = {parts[v].start: v for v in rest if parts[v] is not None and (parts[v].shape, parts[v].dim) == (shape, dim)}
        while at in alike and at < shape[dim] and (size := parts[alike[at]].size):
            chosen.append(alike[at])
            at += size
        if at == shape[dim] and len(chosen) > 1:
            wholes.append([parts[v] for v in chosen])
            for v in chosen:
                rest.remove(v)
    return wholes, rest


def _emit_sum(builder: Builder, eq: Equation, wholes: list[list[_Part]], rest: list[Value]) -> None:
    """The parts put together, and what else is added, with the results of `eq`."""
    made = {"source": eq.source, "origin": eq.origin or "join_gradients"}
    terms: list[tuple[Callable, tuple]] = []
    for parts in wholes:
        dim = parts[0].dim
        if all(part.selected for part in parts):
            terms.append((aten.stack.default, ([part.gradient for part in parts], dim)))
        else:
            given = [builder.emit(aten.unsqueeze.default, p.gradient, dim, **made) if p.selected else p.gradient for p in parts]
            terms.append((aten.cat.default, (given, dim)))
    op, args = terms[0]
    for other in [*(builder.emit(op, *args, **made) for op, args in terms[1:]), *rest]:
        op, args = aten.add.Tensor, (builder.emit(op, *args, **made), other)
    builder.equations.append(Equation(op, args, {}, eq.outputs, eq.source, made["origin"]))


def concatenate_stacks(graph: Graph) -> Graph:
    """A stack, or its copy with the dimensions in another order, as the concatenation of views of its parts: one copy less,
    and none where parts can be written into their places."""
    if not any(eq.op is aten.stack.default for eq in graph.equations):
        return graph
    builder, program, copies = Builder(graph), Program(graph), {}
    for eq in graph.equations:
        copied = eq.op is aten.clone.default and eq.kwargs.get("memory_format") is torch.contiguous_format
        if copied and program.users[eq.args[0]] == [eq] and eq.args[0] not in program.results:
            root, dims = program.root(eq.args[0], eq)
            stack, whole = program.producers.get(root), natural(root.shape)
            order = [(run,) for dim in dims for run in dim]
            if stack is not None and stack.op is aten.stack.default and 1 not in root.shape and sorted(order) == sorted(whole):
                if root not in program.results and len(program.users[root]) == 1:
                    copies[eq] = stack, [whole.index(dim) for dim in order]
    gone = {stack for stack, _ in copies.values()}
    for eq in graph.equations:
        if eq in copies or eq.op is aten.stack.default and eq not in gone:
            stack, order = copies.get(eq) or (eq, list(range(eq.outputs.fake.dim())))
            made = {"source": stack.source, "origin": stack.origin or "concatenate_stacks"}
            axis = (*stack.args, 0)[1] % len(order)
            within, parts = [d - (d > axis) for d in order if d != axis], []
            for part in stack.args[0]:
                part = builder.emit(aten.permute.default, part, within, **made) if within != sorted(within) else part
                parts.append(builder.emit(aten.unsqueeze.default, part, order.index(axis), **made))
            op, args = aten.cat.default, (parts, order.index(axis))
            if len(order) != eq.outputs.fake.dim():  # neighbours are one dimension of the copy
                op, args = aten.view.default, (builder.emit(op, *args, **made), list(eq.outputs.shape))
            builder.equations.append(Equation(op, args, {}, eq.outputs, stack.source, made["origin"]))
        elif eq not in gone:
            builder.equations.append(eq)
    return dead_code(graph.replace(equations=builder.equations))
