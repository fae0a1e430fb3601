"""Passes that make a graph smaller and leave every result bitwise the same."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from ...graph.ir import Equation, Graph, Value, leaves, substitute
from ...graph.operators import has_effect, is_unique

aten = torch.ops.aten


def dead_code(graph: Graph) -> Graph:
    """Drop equations none of whose results is used, but none that has an effect beside."""
    used = set(leaves(graph.outputs))
    kept = []
    for eq in reversed(graph.equations):
        if any(v in used for v in eq.results) or has_effect(eq.op, eq.args, eq.kwargs):
            used.update(eq.inputs)
            kept.append(eq)
    constants = {v: t for v, t in graph.constants.items() if v in used}
    return graph.replace(equations=kept[::-1], constants=constants)


def common_subexpressions(graph: Graph) -> Graph:
    """Compute equal things once. Random draws and collectives are never equal; nor is what was recomputed on purpose."""
    seen: dict[Any, Any] = {}

    def reuse(eq: Equation) -> Any:
        if is_unique(eq.op) or eq.origin.startswith("recomputed"):
            return eq
        first = seen.setdefault((eq.op, _key(eq.args), _key(tuple(sorted(eq.kwargs.items())))), eq)
        return eq if first is eq else first.outputs

    return rewrite(graph, reuse)


def simplify(graph: Graph) -> Graph:
    """Drop operators that change nothing (aliases, views to the same shape, conversions to the same dtype) and
    collapse chains of views."""
    producers: dict[Value, Equation] = {}
    written = _Written()

    def simpler(eq: Equation) -> Any:
        if eq.op is aten.select_scatter.default:
            written.note(eq)
        found = written.selected(eq) if eq.op is aten.select.int else _simpler(eq, producers)
        if isinstance(found, Equation):
            producers.update((v, found) for v in found.results)
        return found

    return rewrite(graph, simpler)


def _without_empty_parts(eq: Equation) -> Value | Equation:
    """A concatenation of what isn't empty: a cache's first entry. PyTorch lets an empty part have one dimension whatever the others have."""
    y, parts = eq.outputs, [v for v in eq.args[0] if v.fake.numel()]
    if len(parts) == 1 and _same(parts[0], y):
        return parts[0]
    if not parts or len(parts) == len(eq.args[0]):
        return eq
    with y.fake.fake_mode:
        alike = torch.cat([v.fake for v in parts], *eq.args[1:])
    return replace(eq, args=(parts, *eq.args[1:])) if (alike.dtype, alike.stride()) == (y.dtype, y.strides) else eq


def _simpler(eq: Equation, producers: dict[Value, Equation]) -> Value | Equation:
    """A value equal to the result of `eq`, or an equation for it, which may be `eq` and may read from further back."""
    if eq.op is aten.cat.default:
        return _without_empty_parts(eq)
    if not isinstance(eq.outputs, Value) or not eq.args or not isinstance(eq.args[0], Value):
        return eq
    x, y = eq.args[0], eq.outputs
    packet = getattr(eq.op, "overloadpacket", None)
    if packet in _IDENTITIES:
        return x
    if packet in _CONSTANTS and y.fake.is_contiguous():  # they look at their argument for its type only
        value = eq.args[1] if packet in (aten.fill, aten.full_like) else _CONSTANTS[packet]
        if isinstance(value, Value):
            return eq
        return replace(eq, op=aten.full.default, args=(list(y.shape), value), kwargs={"dtype": y.dtype, "device": y.device})
    if packet in _COPIES and _same(x, y):
        return x
    if packet is aten.copy and isinstance(eq.args[1], Value) and _same(eq.args[1], y):
        return eq.args[1]
    if packet in (aten._unsafe_view, aten.reshape):
        if packet is aten.reshape and not _viewable(x, y):
            return eq
        eq, packet = replace(eq, op=aten.view.default), aten.view
    if packet in _VIEWS and _same(x, y):
        return x
    if packet is aten.slice_scatter and eq.args[1].shape == x.shape and _same(eq.args[1], y):
        return eq.args[1]  # all of it written
    before = producers.get(x)
    if before is None:
        return eq
    if packet is aten.view and before.op is aten.view.default:
        source = before.args[0]
        if _same(source, y):
            return source
        return replace(eq, args=(source, *eq.args[1:])) if _viewable(source, y) else eq
    if packet in _TRANSPOSES and getattr(before.op, "overloadpacket", None) in _TRANSPOSES:
        source = before.args[0]
        order = _compose(_order(before), _order(eq))
        if order == sorted(order):
            return source
        return replace(eq, op=aten.permute.default, args=(source, order))
    return eq


class _Writes:
    """Places of a tensor that are written one after the other, along one dimension."""

    def __init__(self, base: Value, dim: int):
        self.base, self.dim, self.count = base, dim, 0
        self.at: dict[int, list[tuple[int, Value]]] = {}
        """Of each place what was written there, and by which write."""


class _Written:
    """What is selected of a tensor with another place written is that of the tensor before; of the same place, what was written."""

    def __init__(self) -> None:
        self._of: dict[Value, tuple[_Writes, int]] = {}  # after so many of the writes

    def note(self, eq: Equation) -> None:
        """`eq` writes a place."""
        x, value, dim, index = eq.args
        dim, index = dim % x.fake.dim(), index % x.shape[dim]
        writes, count = self._of.get(x, (None, 0))
        if writes is None or (writes.dim, writes.count, writes.base.strides) != (dim, count, eq.outputs.strides):
            writes, count = _Writes(x, dim), 0
        if x.strides == eq.outputs.strides:
            writes.at.setdefault(index, []).append((count, value))
            writes.count = count + 1
            self._of[eq.outputs] = writes, writes.count

    def selected(self, eq: Equation) -> Value | Equation:
        """What equals the result of `eq`, which selects a place."""
        x, dim, index = eq.args
        writes, count = self._of.get(x, (None, 0))
        if writes is None or writes.dim != dim % x.fake.dim():
            return eq
        value = next((v for n, v in reversed(writes.at.get(index % x.shape[dim], ())) if n < count), None)
        if value is None:
            return self.selected(replace(eq, args=(writes.base, dim, index)))
        return value if _same(value, eq.outputs) else eq


_CONSTANTS = {aten.fill: None, aten.full_like: None, aten.zeros_like: 0, aten.ones_like: 1}
_IDENTITIES = {aten.alias, aten.detach, aten.lift_fresh}
_COPIES = {aten._to_copy, aten.clone}
_VIEWS = {aten.view, aten.expand, aten.permute, aten.transpose, aten.squeeze, aten.unsqueeze, aten.slice}
_TRANSPOSES = {aten.t, aten.transpose, aten.permute}


def _same(x: Value, y: Value) -> bool:
    return all(getattr(x, name) == getattr(y, name) for name in ("shape", "strides", "dtype", "device", "pending"))


def _viewable(x: Value, y: Value) -> bool:
    """Can `y`, a reshaping of `x` with y's recorded strides, be a view of x's memory?"""
    try:
        with x.fake.fake_mode:
            return aten.view.default(x.fake, list(y.shape)).stride() == y.strides
    except RuntimeError:
        return False


def _order(eq: Equation) -> list[int]:
    ndim = eq.args[0].fake.dim()
    order = list(range(ndim))
    if eq.op.overloadpacket is aten.permute:
        return [d % ndim for d in eq.args[1]]
    if ndim > 1:
        a, b = (0, 1) if eq.op.overloadpacket is aten.t else (eq.args[1] % ndim, eq.args[2] % ndim)
        order[a], order[b] = b, a
    return order


def _compose(first: list[int], second: list[int]) -> list[int]:
    return [first[i] for i in second]


def rewrite(graph: Graph, fn: Callable[[Equation], Any]) -> Graph:
    """Go through the equations in order, with earlier replacements made; `fn(eq)` returns the equation to have there, or a
    tree of earlier values shaped like the outputs, which are used instead."""
    env: dict[Value, Any] = {}
    kept = []
    for eq in graph.equations:
        eq = eq.reading(env)
        replacement = fn(eq)
        if isinstance(replacement, Equation):
            kept.append(replacement)
        else:
            env.update(zip(leaves(eq.outputs), leaves(replacement)))
    return graph.replace(equations=kept, outputs=substitute(graph.outputs, env))


def _key(tree: Any) -> Any:
    """A hashable picture of an argument; 1, 1.0 and True are told apart."""
    if isinstance(tree, (list, tuple)):
        return tuple(_key(item) for item in tree)
    return tree if isinstance(tree, Value) else (type(tree), repr(tree))


