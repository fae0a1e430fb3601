"""Iteration spaces: where the elements of an operand lie as a kernel goes through a group's elements.

The elements of a group are numbered in memory order. A *cut* is a count of elements at which some dimension begins
anew: for a contiguous [8, 256, 384] these are 384, 98304 and 786432. Equations of different shapes share a space if
their cuts make one chain of divisors; an operand's place is then its stride in each dimension between two cuts.
"""

from __future__ import annotations

from collections.abc import Iterable

from ..graph.ir import Equation, Value


def memory_order(v: Value) -> tuple[int, ...] | None:
    """The dimensions of `v`, slowest first, if its elements fill one block of memory; else None."""
    order = sorted(range(v.fake.dim()), key=lambda i: (-v.strides[i], v.shape[i] == 1, i))
    expected = 1
    for i in reversed(order):
        if v.shape[i] != 1:
            if v.strides[i] != expected:
                return None
            expected *= v.shape[i]
    return tuple(order)


def dimension(join: Equation) -> int:
    """The dimension of the result in which a `cat` or a `stack` puts its operands."""
    return (*join.args, 0)[1] % join.outputs.fake.dim()


WORTH_A_COPY = 32768
"""Elements from which on the order in which they are read matters."""


def out_of_order(x: Value, y: Value) -> bool:
    """Would reading all of `x`, another order of dimensions in memory, beside the contiguous `y` of its shape take each number from another
    cache line?"""
    if x.shape != y.shape or not contiguous(y) or y.fake.numel() < WORTH_A_COPY or contiguous(x) or memory_order(x) is None:
        return False
    inner = max(d for d, n in enumerate(y.shape) if n > 1)
    return x.strides[inner] != 1


def contiguous(v: Value) -> bool:
    return v.fake.numel() > 0 and v.fake.is_contiguous()


def cuts_of(shape: Iterable[int], scale: int = 1) -> list[int]:
    """Where the dimensions of `shape` begin anew, in elements, each of them standing for `scale` in a row."""
    cuts, size = [scale] if scale > 1 else [], scale
    for n in reversed(tuple(shape)):
        if n != 1:
            size *= n
            cuts.append(size)
    return cuts


def refine(a: list[int], b: list[int]) -> list[int] | None:
    """The cuts of both; None if they make no chain of divisors."""
    cuts = sorted({*a, *b})
    return cuts if all(y % x == 0 for x, y in zip(cuts, cuts[1:])) else None


def place(v: Value, shape: tuple[int, ...], order: tuple[int, ...] | None, cuts: list[int], scale: int = 1) -> tuple[int, ...]:
    """Strides of `v`, expanded to `shape`, between the cuts, outermost first. With `scale`, each element serves that
    many in a row."""
    lead = len(shape) - v.fake.dim()
    dims = [(1, 0)] * lead + list(zip(v.shape, v.strides))
    result, begin, at = [], scale, 0
    while at < len(cuts) and cuts[at] <= scale:
        result.append(0)
        at += 1
    for i in reversed(order if order is not None else range(len(shape))):
        if shape[i] == 1:
            continue
        step = 0 if dims[i][0] == 1 else dims[i][1]
        inside = begin
        while at < len(cuts) and cuts[at] <= begin * shape[i]:
            result.append(step * (inside // begin))
            inside = cuts[at]
            at += 1
        begin *= shape[i]
    result += [0] * (len(cuts) - at)
    return tuple(reversed(result))


def squash(sizes: list[int], strides: tuple[int, ...]) -> list[tuple[int, int]]:
    """(size, stride) with neighbours merged where they are one dimension in memory."""
    dims: list[tuple[int, int]] = []
    for n, s in zip(sizes, strides):
        if dims and dims[-1][1] == s * n:
            dims[-1] = dims[-1][0] * n, s
        else:
            dims.append((n, s))
    return dims


def sizes_of(cuts: list[int]) -> list[int]:
    """The sizes of the dimensions between the cuts, outermost first."""
    return [b // a for a, b in zip([1, *cuts], cuts)][::-1]
