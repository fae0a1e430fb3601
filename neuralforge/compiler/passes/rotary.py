"""Rotary positions written out: one kernel."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import NamedTuple

import torch

from ...graph.ir import Equation, Value
from ...kernels import rotary as kernel
from .patterns import Match, Program

aten = torch.ops.aten


def rotary(program: Program) -> Iterator[Match]:
    """x cos + cat(-x2, x1) sin, of the halves (x1, x2) of x's last dimension, or cat(x1 cos - x2 sin, x2 cos + x1 sin) with tables
    of half the width, turned either way: the halves by `chunk`, `split` or slices, in any order of operands, computed in
    float32 and rounded to x's type at the end or all in x's type."""
    for eq in program.graph.equations:
        found = None
        if eq.op is aten.add.Tensor and not eq.kwargs:
            found = _by_swapped_halves(program, eq)
        elif eq.op is aten.cat.default and _joins_two(eq):
            found = _by_parts(program, eq)
        if found is not None:
            yield found


def _by_swapped_halves(program: Program, eq: Equation) -> Match | None:
    for terms in (eq.args, eq.args[::-1]):
        products = [program.producer(v, aten.mul.Tensor) for v in terms]
        if None in products:
            return None
        for (x, cos), (halves, sin) in product(*((of.args, of.args[::-1]) for of in products)):
            if all(isinstance(v, Value) for v in (x, cos, halves, sin)) and _swapped(program, halves) is program.same(x):
                return _match(program, eq.outputs, x, cos, sin)
    return None


class _Term(NamedTuple):
    """A half of x times a table, in a sum."""

    x: Value
    sign: int
    table: Value


def _by_parts(program: Program, eq: Equation) -> Match | None:
    first, second = (_terms(program, v, eq.outputs.shape) for v in eq.args[0])
    if not first.keys() == second.keys() == {0, 1}:
        return None
    (cos, sin), (sin2, cos2) = (first[0], first[1]), (second[0], second[1])
    same = cos.x is sin.x is cos2.x is sin2.x and cos.table is cos2.table and sin.table is sin2.table
    if not same or not cos.sign == cos2.sign == 1 or sin.sign == sin2.sign:
        return None
    return _match(program, eq.outputs, cos.x, cos.table, sin.table, transposed=sin.sign == 1)


def _terms(program: Program, v: Value, shape: torch.Size) -> dict[int, _Term]:
    """Of a sum or difference of two products of halves of an x of this shape with tables: by which half it is."""
    found: dict[int, _Term] = {}
    eq = program.producer(v, aten.add.Tensor, aten.sub.Tensor)
    for i, term in enumerate(eq.args if eq is not None and not eq.kwargs else ()):
        times = program.producer(term, aten.mul.Tensor)
        for half, table in (times.args, times.args[::-1]) if times is not None else ():
            for which in (0, 1):
                x = _half(program, half, which)
                if x is not None and x.shape == shape and isinstance(table, Value):
                    sign = -1 if i == 1 and eq.op is aten.sub.Tensor else 1
                    negative = program.producer(table, aten.neg.default)
                    table, sign = (table, sign) if negative is None else (negative.args[0], -sign)
                    found[which] = _Term(x, sign, program.same(table))
    return found


def _match(program: Program, y: Value, x: Value, cos: Value, sin: Value, transposed: bool = False) -> Match | None:
    """`y` as the rotation of x, where the kernel serves it."""
    if x.shape != y.shape:
        return None
    width = y.shape[-1] if program.producers[y].op is aten.add.Tensor else y.shape[-1] // 2
    out, x = _narrow(program, y, x)
    with x.fake.fake_mode:
        like = torch.empty_like(x.fake)
    tables = all(t.fake.dim() and t.shape[-1] == width for t in (cos, sin))
    if out.dtype != x.dtype or not tables or not kernel.native(x.fake, cos.fake, sin.fake, like):
        return None

    def replacement(env: dict[Value, torch.Tensor]) -> list[torch.Tensor]:
        return [kernel.rotary(env[x], env[cos], env[sin], transposed)]

    # That a table was negated before doesn't matter: others may read it so too.
    negated = {eq.outputs for eq in program.users.get(sin, ()) if eq.op is aten.neg.default}
    equations = program.between([out], {x, cos, sin, *negated})
    return Match(equations, [out], replacement, f"{list(x.shape)}, tables {list(cos.shape)}", ("rotary", transposed))


def _swapped(program: Program, v: object) -> Value | None:
    """The x of which `v` is cat(-x2, x1) along the last dimension."""
    cat = program.producer(v, aten.cat.default)
    if cat is None or not _joins_two(cat):
        return None
    negative = program.producer(cat.args[0][0], aten.neg.default)
    second = _half(program, negative.args[0], 1) if negative is not None else None
    return second if second is not None and second is _half(program, cat.args[0][1], 0) else None


def _joins_two(cat: Equation) -> bool:
    """Does it join two along the last dimension?"""
    return len(cat.args[0]) == 2 and (*cat.args, 0)[1] in (-1, cat.outputs.fake.dim() - 1)


def _half(program: Program, v: Value, which: int) -> Value | None:
    """What `v` is the first or second half of, along the last dimension."""
    eq = program.producer(v, aten.split.Tensor, aten.split_with_sizes.default, aten.slice.Tensor)
    if eq is None:
        return None
    x, v = eq.args[0], program.same(v)
    last, half = x.fake.dim() - 1, x.shape[-1] // 2
    if eq.op is aten.slice.Tensor:
        _, dim, start, end, step = (*eq.args, *(None, 0, None, None, 1)[len(eq.args) :])
        start, end, step = slice(start, end, step).indices(x.shape[-1])
        right = dim in (-1, last) and step == 1 and (start, end) == ((0, half), (half, 2 * half))[which]
    else:
        right = (*eq.args, 0)[2] in (-1, last) and len(eq.results) == 2 and eq.results[which] is v
    return program.same(x) if right and x.shape[-1] == 2 * v.shape[-1] else None


def _narrow(program: Program, y: Value, x: Value) -> tuple[Value, Value]:
    """The result and x as they are before and after a computation in a wider type than theirs."""
    users = program.users.get(y, ())
    if y.dtype != torch.float32 or len(users) != 1 or users[0].op is not aten._to_copy.default or y in program.results:
        return y, x
    source = program.producer(x, aten._to_copy.default)
    narrow = source.args[0] if source is not None and x.dtype == torch.float32 else x
    out = users[0].outputs
    return (out, narrow) if narrow.dtype == out.dtype == torch.bfloat16 else (y, x)
