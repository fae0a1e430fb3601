"""Rotary positions written out: one kernel."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import cache
from itertools import product
from typing import NamedTuple

import torch

from ...graph.ir import Equation, Value
from ...kernels import rotary as kernel
from ..space import dimension
from .dataflow import Dataflow
from .numbers import Numbers
from .patterns import Match

aten = torch.ops.aten


_RESHAPES = {aten.view.default, aten._unsafe_view.default, aten.reshape.default}
_PARTS = aten.split.Tensor, aten.split_with_sizes.default, aten.slice.Tensor, aten.unbind.int, aten.select.int


def rotary(flow: Dataflow) -> Iterator[Match]:
    """The pairs (x1, x2) of x's numbers turned either way, x1 and x2 being the halves of its last dimension, or interleaved:
    x cos + join(-x2, x1) sin, or join(x1 cos - x2 sin, x2 cos + x1 sin) with tables of half the width, in any order of
    operands, the parts by `chunk`, `split`, slices, `unbind` or indices. Computed in float32 and rounded to x's
    type at the end or all in x's type. Or interleaved pairs as complex numbers times a table of such, in float32, rounded."""
    numbers = cache(lambda: Numbers(flow.graph).of)  # few programs need them
    for eq in flow.graph.equations:
        found = None
        if eq.op is aten.add.Tensor and not eq.kwargs:
            found = _by_swapped_parts(flow, eq)
        elif (joined := _joined(flow, eq)) is not None:
            found = _by_parts(flow, eq.outputs, *joined, numbers)
        elif eq.op in _RESHAPES:
            found = _by_complex_numbers(flow, eq.outputs)
        if found is not None:
            yield found


def _by_swapped_parts(flow: Dataflow, eq: Equation) -> Match | None:
    for terms in (eq.args, eq.args[::-1]):
        products = [flow.producer(v, aten.mul.Tensor) for v in terms]
        if None in products:
            return None
        for (x, cos), (swapped, sin) in product(*((of.args, of.args[::-1]) for of in products)):
            if all(isinstance(v, Value) for v in (x, cos, swapped, sin)) and x.shape == eq.outputs.shape:
                found = _swapped(flow, swapped, x.shape)
                if found is not None and found[0] is _flat(flow, x):
                    return _match(flow, eq.outputs, x, [cos, sin], interleaved=found[1])
    return None


def _swapped(flow: Dataflow, v: Value, shape: torch.Size) -> tuple[Value, bool] | None:
    """The x, flat, of which `v` is join(-x2, x1), and whether interleaved."""
    joined = _joined(flow, flow.producers.get(flow.same(v)))
    negative = flow.producer(joined[0][0], aten.neg.default) if joined is not None else None
    if negative is None:
        return None
    (_, x1), interleaved = joined
    first, second = (_part(flow, part, shape) for part in (x1, negative.args[0]))
    if first is None or first[1:] != (0, interleaved) or second != (first.x, 1, interleaved):
        return None
    return first.x, interleaved


class _Term(NamedTuple):
    """A part of x times a table, in a sum."""

    x: Value
    sign: int
    table: Value


def _by_parts(
    flow: Dataflow, y: Value, parts: list[Value], interleaved: bool, numbers: Callable[[], dict[Value, int]]
) -> Match | None:
    first, second = (_terms(flow, v, y.shape, interleaved) for v in parts)
    if not first.keys() == second.keys() == {0, 1}:
        return None
    (cos, sin), (sin2, cos2) = (first[0], first[1]), (second[0], second[1])
    same = [(cos.x, sin.x), (cos.x, cos2.x), (cos.x, sin2.x), (cos.table, cos2.table), (sin.table, sin2.table)]
    if not all(u is v or numbers()[u] == numbers()[v] for u, v in same):
        return None
    if not cos.sign == cos2.sign == 1 or sin.sign == sin2.sign:
        return None
    again = [cos2.table, sin2.table]
    return _match(flow, y, cos.x, [cos.table, sin.table], sin.sign == 1, interleaved, again)


def _terms(flow: Dataflow, v: Value, shape: torch.Size, interleaved: bool) -> dict[int, _Term]:
    """Of a sum or difference of two products of parts of an x of this shape with tables: by which part it is."""
    found: dict[int, _Term] = {}
    eq = flow.producer(v, aten.add.Tensor, aten.sub.Tensor)
    for i, term in enumerate(eq.args if eq is not None and not eq.kwargs else ()):
        times = flow.producer(term, aten.mul.Tensor)
        for factor, table in (times.args, times.args[::-1]) if times is not None else ():
            part = _part(flow, factor, shape)
            if part is not None and part.interleaved == interleaved and isinstance(table, Value):
                sign = -1 if i == 1 and eq.op is aten.sub.Tensor else 1
                negative = flow.producer(table, aten.neg.default)
                table, sign = (table, sign) if negative is None else (negative.args[0], -sign)
                found[part.which] = _Term(part.x, sign, flow.same(table))
    return found


def _by_complex_numbers(flow: Dataflow, y: Value) -> Match | None:
    """Where the result is rounded: in float32 alone PyTorch's product of complex numbers is as fast."""
    real = flow.producer(flow.producers[y].args[0], aten.view_as_real.default)
    times = flow.producer(real.args[0], aten.mul.Tensor) if real is not None else None
    for z, table in (times.args, times.args[::-1]) if times is not None else ():
        z = flow.producer(z, aten.view_as_complex.default)
        if z is not None and isinstance(table, Value) and z.args[0].shape == (*y.shape[:-1], y.shape[-1] // 2, 2):
            match = _match(flow, y, z.args[0], [table], transposed=True, interleaved=True)
            return match if match is not None and match.outputs != [y] else None
    return None


def _match(
    flow: Dataflow,
    y: Value,
    x: Value,
    tables: list[Value],
    transposed: bool = False,
    interleaved: bool = False,
    again: Iterable[Value] = (),
) -> Match | None:
    """`y` as the rotation of x, viewed as y's shape, where the kernel serves it; `again`: the tables, computed once more."""
    width = y.shape[-1] if flow.producers[y].op is aten.add.Tensor else y.shape[-1] // 2
    out, x = _narrow(flow, y, _flat(flow, x))
    with x.fake.fake_mode:
        operands = x.fake.reshape(y.shape), *_cos_and_sin(*(t.fake for t in tables))
        served = all(t.dim() and t.shape[-1] == width for t in operands[1:])
        served = served and kernel.native(*operands, torch.empty_like(operands[0]))
    if out.dtype != x.dtype or not served:
        return None

    def replacement(env: dict[Value, torch.Tensor]) -> list[torch.Tensor]:
        cos, sin = _cos_and_sin(*(env[t] for t in tables))
        return [kernel.rotary(env[x].reshape(y.shape), cos, sin, transposed, interleaved)]

    # That a table was negated before doesn't matter: others may read it so too.
    negated = {eq.outputs for t in tables for eq in flow.users.get(t, ()) if eq.op is aten.neg.default}
    equations = flow.between([out], {x, *tables, *again, *negated})
    reason = f"{list(y.shape)}, tables {list(tables[0].shape)}"
    return Match(equations, [out], replacement, reason, ("rotary", transposed, interleaved))


def _cos_and_sin(cos: torch.Tensor, sin: torch.Tensor | None = None) -> tuple[torch.Tensor, ...]:
    """The tables from two, or from one of complex numbers: of the conjugates, as numbers that are conjugated lazily can't be
    viewed as real. Copied here, once, where the kernel would copy them in each call."""
    tables = (cos, sin) if sin is not None else torch.view_as_real(torch.conj_physical(cos)).unbind(-1)
    return tuple(t if t.dim() and t.stride(-1) == 1 else t.contiguous() for t in tables)


def _joined(flow: Dataflow, eq: Equation | None) -> tuple[list[Value], bool] | None:
    """The two that `eq` joins along the last dimension, and whether interleaved."""
    if eq is None or eq.op is not aten.cat.default and eq.op not in _RESHAPES:
        return None
    interleaved = eq.op in _RESHAPES
    join = flow.producer(eq.args[0], aten.stack.default) if interleaved else eq
    if join is None or len(join.args[0]) != 2 or dimension(join) != join.outputs.fake.dim() - 1:
        return None
    return (join.args[0], interleaved) if eq.outputs.shape[:-1] == join.args[0][0].shape[:-1] else None


class _Part(NamedTuple):
    """The first or the second number of each pair of an x, flat."""

    x: Value
    which: int
    interleaved: bool


def _part(flow: Dataflow, v: Value, shape: torch.Size) -> _Part | None:
    """What part `v` is of an x viewed as this shape: told by taking it of rows of K numbers in one place of memory."""
    eq = flow.producer(v, *_PARTS)
    n, half = len(shape) - 1, shape[-1] // 2
    if eq is None or v.shape != (*shape[:n], half):
        return None
    of = eq.args[0]
    row = torch.empty(of.shape[n:], device="meta")
    if of.shape[:n] != shape[:n] or row.numel() != shape[-1]:
        return None
    taken = eq.op(row.as_strided(of.shape, (*[0] * n, *row.stride())), *eq.args[1:])
    taken = taken if isinstance(taken, torch.Tensor) else taken[eq.results.index(flow.same(v))]
    places = {(0, 1): (0, False), (half, 1): (1, False), (0, 2): (0, True), (1, 2): (1, True)}
    part = places.get((taken.storage_offset(), taken.stride(-1)))
    return _Part(_flat(flow, of), *part) if part is not None and not any(taken.stride()[:-1]) else None


def _flat(flow: Dataflow, x: Value) -> Value:
    """What `x` is a reshape of."""
    while (eq := flow.producer(x, *_RESHAPES)) is not None:
        x = eq.args[0]
    return flow.same(x)


def _narrow(flow: Dataflow, y: Value, x: Value) -> tuple[Value, Value]:
    """The result and x as they are before and after a computation in a wider type than theirs."""
    users = flow.users.get(y, ())
    if y.dtype != torch.float32 or len(users) != 1 or users[0].op is not aten._to_copy.default or y in flow.results:
        return y, x
    source = flow.producer(x, aten._to_copy.default)
    narrow = source.args[0] if source is not None and x.dtype == torch.float32 else x
    out = users[0].outputs
    return (out, narrow) if narrow.dtype == out.dtype == torch.bfloat16 else (y, x)
