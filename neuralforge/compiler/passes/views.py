"""Views as data: where each dimension of a view lies in the tensor it is a view of.

A dimension is a list of *runs*, outermost first: `Run(axis, size, step)` is `size` places along the root's `axis`,
`step` apart. [B, T, H K] split into heads and transposed to [B, H, T, K] is

    ((Run(0, B, 1),), (Run(2, H, K),), (Run(1, T, 1),), (Run(2, K, 1),))

Copies change nothing here, so a chain of views and copies becomes one rearrangement of its root.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from ...graph.ir import Equation, Value

aten = torch.ops.aten


class Run(NamedTuple):
    axis: int | None
    """None: repeated."""
    size: int
    step: int


Dims = tuple[tuple[Run, ...], ...]


def natural(shape: tuple[int, ...]) -> Dims:
    """A tensor as a view of itself."""
    return tuple((Run(axis, size, 1),) if size != 1 else () for axis, size in enumerate(shape))


def regroup(dims: Dims, shape: tuple[int, ...]) -> Dims | None:
    """`dims` viewed as `shape`; None where a new dimension would take odd parts of old ones, or nothing is there to view."""
    if 0 in shape:
        return None
    runs = [run for dim in reversed(dims) for run in reversed(dim)]  # innermost first: pop takes the outermost
    result = []
    for size in shape:
        taken: list[Run] = []
        while size > 1:
            if not runs:
                return None
            run = runs.pop()
            if size % run.size == 0:
                taken.append(run)
                size //= run.size
            elif run.size % size == 0:
                inner = run.size // size
                runs.append(Run(run.axis, inner, run.step))
                taken.append(Run(run.axis, size, run.step * inner))
                size = 1
            else:
                return None
        result.append(tuple(taken))
    return None if runs else tuple(map(_joined, result))


def reshaped(dims: Dims, root: tuple[int, ...], shape: tuple[int, ...]) -> bool:
    """Is the view `dims`, of `shape`, all of a root of that shape, in its order?"""
    return dims == regroup(natural(root), shape)


def compose(outer: Dims | None, inner: Dims | None, shape: tuple[int, ...]) -> Dims | None:
    """A view of a view: `outer` speaks of the axes (of `shape`) whose places in the root `inner` tells."""
    if outer is None or inner is None or 0 in shape:
        return None
    result = []
    for dim in outer:
        runs: list[Run] = []
        for run in dim:
            if run.axis is None:
                runs.append(run)
                continue
            parts = regroup((inner[run.axis],), (shape[run.axis] // (run.size * run.step), run.size, run.step))
            if parts is None:
                return None
            runs += parts[1]
        result.append(_joined(runs))
    return tuple(result)


def inverse(dims: Dims, shape: tuple[int, ...]) -> Dims | None:
    """Where the root (of `shape`) lies in its view; None if the view repeats or leaves out any of it."""
    found: dict[int, list[tuple[int, Run]]] = {axis: [] for axis in range(len(shape))}
    for place, dim in enumerate(dims):
        step = 1
        for run in reversed(dim):
            if run.axis is None:
                return None
            found[run.axis].append((run.step, Run(place, run.size, step)))
            step *= run.size
    result = []
    for axis, runs in found.items():
        runs.sort(key=lambda item: -item[0])
        if math.prod(run.size for _, run in runs) != shape[axis]:
            return None
        result.append(_joined([run for _, run in runs]))
    return tuple(result)


def size(dim: tuple[Run, ...]) -> int:
    return math.prod(run.size for run in dim)


def viewed(eq: Equation) -> Dims | None:
    """The result of a view or a copy as a view of its operand; None if `eq` is neither."""
    packet = getattr(eq.op, "overloadpacket", None)
    if packet not in _VIEWS or not isinstance(eq.outputs, Value):
        return None
    x, y = eq.args[0], eq.outputs
    dims, ndim = natural(x.shape), x.fake.dim()
    if packet in _COPIES:
        return dims if (x.dtype, x.device, x.pending) == (y.dtype, y.device, y.pending) else None
    if packet in _RESHAPES:
        return regroup(dims, y.shape)
    if packet is aten.permute:
        return tuple(dims[d] for d in eq.args[1])
    if packet is aten.t:
        return dims[::-1]
    if packet is aten.transpose:
        order = list(range(ndim))
        a, b = eq.args[1] % ndim, eq.args[2] % ndim
        order[a], order[b] = b, a
        return tuple(dims[d] for d in order)
    dims = ((),) * (y.fake.dim() - ndim) + dims  # expand
    was = (1,) * (y.fake.dim() - ndim) + tuple(x.shape)
    return tuple((Run(None, m, 0),) if n == 1 != m else dim for dim, n, m in zip(dims, was, y.shape))


_COPIES = {aten.alias, aten.detach, aten.clone, aten.lift_fresh, aten._to_copy}
_RESHAPES = {aten.view, aten._unsafe_view, aten.reshape, aten.unsqueeze, aten.squeeze}
_VIEWS = {*_COPIES, *_RESHAPES, aten.permute, aten.t, aten.transpose, aten.expand}


def arrange(x: torch.Tensor, dims: Dims) -> torch.Tensor:
    """The view `dims` of `x`, without a copy where strides can express it."""
    if dims == natural(x.shape):
        return x
    runs = [run for dim in dims for run in dim]
    by_place = sorted((run for run in runs if run.axis is not None), key=lambda run: (run.axis, -run.step))
    split = [run.size for run in by_place]
    x = x.view(split) if list(x.shape) != split else x
    order = [by_place.index(run) for run in runs if run.axis is not None]
    x = x.permute(order) if order != sorted(order) else x
    if len(order) < len(runs):
        for at, run in enumerate(runs):
            x = x.unsqueeze(at) if run.axis is None else x
        x = x.expand([run.size for run in runs])
    shape = [size(dim) for dim in dims]
    return x.reshape(shape) if list(x.shape) != shape else x


def covers(dims: Dims, shape: tuple[int, ...]) -> bool:
    """Does the view show every element of its root, some perhaps repeatedly?"""
    seen = [1] * len(shape)
    for run in (run for dim in dims for run in dim if run.axis is not None):
        seen[run.axis] *= run.size
    return tuple(seen) == tuple(shape)


def _joined(runs: list[Run] | tuple[Run, ...]) -> tuple[Run, ...]:
    """Neighbours that are one run together."""
    result: list[Run] = []
    for run in runs:
        if run.size == 1:
            continue
        last = result[-1] if result else None
        if last and last.axis is None is run.axis:
            result[-1] = Run(None, last.size * run.size, 0)
        elif last and last.axis == run.axis and last.step == run.step * run.size:
            result[-1] = Run(run.axis, last.size * run.size, run.step)
        else:
            result.append(run)
    return tuple(result)
