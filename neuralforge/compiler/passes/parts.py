"""What is put together of parts: sums of gradients of parts, writes one after the other, and stacks, as concatenations, which nothing
copies where the parts can be written into their places."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from ...graph.builder import Builder
from ...graph.ir import Equation, Graph, Value
from ..space import dimension
from .dataflow import Dataflow
from .simplify import dead_code
from .views import natural

aten = torch.ops.aten


class _Part(NamedTuple):
    """A part of a tensor of that shape, or the gradient of one, from place `start` of dimension `dim` on; without that dimension if it
    is one place selected."""

    value: Value
    shape: tuple[int, ...]
    dim: int
    start: int
    selected: bool

    @property
    def size(self) -> int:
        return 1 if self.selected else self.value.shape[self.dim]


def join_gradients(graph: Graph) -> Graph:
    """Sums of gradients that are zero but for their parts of a tensor, all of it: the parts side by side. (`x[0]`, `x[1]` and
    `x[2]` have such gradients.)"""
    if not any(eq.op in (aten.select_backward.default, aten.slice_backward.default) for eq in graph.equations):
        return graph
    flow = Dataflow(graph)
    inside: set[Equation] = set()  # of a larger sum that is joined
    joined: dict[Equation, tuple[list[list[_Part]], list[Value]]] = {}
    for eq in reversed(graph.equations):
        if eq.op is aten.add.Tensor and not eq.kwargs and eq not in inside:
            terms, adds = terms_of(flow, eq)
            wholes, rest = _wholes({v: _part(flow.producers.get(v)) for v in terms}, terms)
            if wholes:
                joined[eq] = wholes, rest
                inside |= adds
    return _replaced(graph, joined, _emit_sum)


def _replaced(graph: Graph, joined: dict[Equation, tuple], emit: Callable) -> Graph:
    """The graph with each equation in `joined` made anew by `emit(builder, equation, *joined[equation])`."""
    builder = Builder(graph)
    for eq in graph.equations:
        if eq in joined:
            emit(builder, eq, *joined[eq])
        else:
            builder.equations.append(eq)
    return dead_code(graph.replace(equations=builder.equations)) if joined else graph


def terms_of(flow: Dataflow, eq: Equation) -> tuple[list[Value], set[Equation]]:
    """What is added up, by `eq` and by additions whose results are read by that alone."""
    terms, adds, todo = [], {eq}, list(eq.args[::-1])
    while todo:
        v = todo.pop()
        maker = flow.producers.get(v) if isinstance(v, Value) and v.shape == eq.outputs.shape else None
        if maker is not None and maker.op is aten.add.Tensor and not maker.kwargs and len(flow.users[v]) == 1 and v not in flow.results:
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
    terms = [_side_by_side(builder, parts, made) for parts in wholes]
    op, args = terms[0]
    for other in [*(builder.emit(op, *args, **made) for op, args in terms[1:]), *rest]:
        op, args = aten.add.Tensor, (builder.emit(op, *args, **made), other)
    builder.equations.append(Equation(op, args, {}, eq.outputs, eq.source, made["origin"]))


def _side_by_side(builder: Builder, parts: list[_Part], made: dict[str, str]) -> tuple[Callable, tuple]:
    """What puts parts together that are all of a tensor: an operator and its arguments."""
    dim = parts[0].dim
    if all(part.selected for part in parts):
        return aten.stack.default, ([part.value for part in parts], dim)
    given = [builder.emit(aten.unsqueeze.default, p.value, dim, **made) if p.selected else p.value for p in parts]
    return aten.cat.default, (given, dim)


def join_writes(graph: Graph) -> Graph:
    """Places and ranges written one after the other, of a tensor that nobody reads in between, as one concatenation: each write by itself
    copies all of the tensor."""
    if not any(eq.op in _WRITES for eq in graph.equations):
        return graph
    graph = _written_directly(graph)
    flow = Dataflow(graph)
    inside: set[Equation] = set()
    joined = {}
    for eq in reversed(graph.equations):
        if eq.op in _WRITES and eq not in inside and eq.outputs.fake.is_contiguous():
            writes = _writes_up_to(flow, eq)
            pieces = _pieces([_write(write) for write in writes], eq.outputs.shape)
            if len(writes) > 1 and pieces is not None:
                joined[eq] = writes[-1].args[0], pieces
                inside.update(writes)
    return _replaced(graph, joined, _emit_pieces)


def _written_directly(graph: Graph) -> Graph:
    """`x[0] = y` copies y into the place that x[0] has, and then writes that: y is written, and x[0] not read for its shape."""
    source = {eq.outputs: eq.args[1] for eq in graph.equations if eq.op is aten.copy.default and isinstance(eq.args[1], Value)}
    equations = []
    for eq in graph.equations:
        y = source.get(eq.args[1]) if eq.op in _WRITES else None
        if y is not None and (y.shape, y.dtype, y.pending) == (eq.args[1].shape, eq.args[1].dtype, eq.args[1].pending):
            eq = eq.reading({eq.args[1]: y})
        equations.append(eq)
    return dead_code(graph.replace(equations=equations))


_WRITES = (aten.select_scatter.default, aten.slice_scatter.default)


def _write(eq: Equation) -> _Part | None:
    """What is written, as a part; None where it is every other place, say."""
    base, value, *where = eq.args
    dim, start, end, step = (*where, *(0, None, None, 1)[len(where) :]) if eq.op is _WRITES[1] else (*where, None, 1)
    shape = tuple(base.shape)
    start = slice(start, None).indices(shape[dim])[0] if eq.op is _WRITES[1] else start % shape[dim]
    return _Part(value, shape, dim % len(shape), start, eq.op is _WRITES[0]) if step == 1 and not eq.kwargs else None


def _writes_up_to(flow: Dataflow, eq: Equation) -> list[Equation]:
    """The last of some writes to one tensor along one dimension, and those before it, last first."""
    writes, part = [eq], _write(eq)
    while True:
        base = writes[-1].args[0]
        maker = flow.producers.get(base)
        if part is None or maker is None or maker.op not in _WRITES or base in flow.results or len(flow.users[base]) > 1:
            return writes
        before = _write(maker)
        if before is None or before.dim != part.dim:
            return writes
        writes.append(maker)


def _pieces(writes: list[_Part | None], shape: tuple[int, ...]) -> list[_Part | tuple[int, int]] | None:
    """What the result is made of, in order: parts written, and ranges of the tensor before. None if parts overlap in part."""
    if None in writes:
        return None
    last: dict[int, _Part] = {}
    for part in writes:
        first = last.setdefault(part.start, part)
        if first.size != part.size:
            return None
    pieces: list[_Part | tuple[int, int]] = []
    at, (_, _, dim, _, _) = 0, writes[0]
    for start in sorted(last):
        if start < at:
            return None
        pieces += [(at, start)] if start > at else []
        pieces += [last[start]] if last[start].size else []
        at = start + last[start].size
    return pieces + ([(at, shape[dim])] if at < shape[dim] else [])


def _emit_pieces(builder: Builder, eq: Equation, base: Value, pieces: list[_Part | tuple[int, int]]) -> None:
    made, (_, shape, dim, _, _) = {"source": eq.source, "origin": eq.origin or "join_writes"}, _write(eq)
    parts = []
    for piece in pieces:
        if not isinstance(piece, _Part):
            piece = _Part(builder.emit(aten.slice.Tensor, base, dim, *piece, **made), shape, dim, piece[0], False)
        parts.append(piece)
    op, args = _side_by_side(builder, parts, made)
    builder.equations.append(Equation(op, args, {}, eq.outputs, eq.source, made["origin"]))


def concatenate_stacks(graph: Graph) -> Graph:
    """A stack, or its copy with the dimensions in another order, as the concatenation of views of its parts: one copy less,
    and none where parts can be written into their places."""
    if not any(eq.op is aten.stack.default for eq in graph.equations):
        return graph
    builder, flow, copies = Builder(graph), Dataflow(graph), {}
    for eq in graph.equations:
        copied = eq.op is aten.clone.default and eq.kwargs.get("memory_format") is torch.contiguous_format
        if copied and flow.users[eq.args[0]] == [eq] and eq.args[0] not in flow.results:
            root, dims = flow.root(eq.args[0], eq)
            stack, whole = flow.producers.get(root), natural(root.shape)
            order = [(run,) for dim in dims for run in dim]
            if stack is not None and stack.op is aten.stack.default and 1 not in root.shape and sorted(order) == sorted(whole):
                if root not in flow.results and len(flow.users[root]) == 1:
                    copies[eq] = stack, [whole.index(dim) for dim in order]
    gone = {stack for stack, _ in copies.values()}
    for eq in graph.equations:
        if eq in copies or eq.op is aten.stack.default and eq not in gone:
            stack, order = copies.get(eq) or (eq, list(range(eq.outputs.fake.dim())))
            made = {"source": stack.source, "origin": stack.origin or "concatenate_stacks"}
            axis = dimension(stack)
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
