"""Reductions by index, masks that pick or place, flat indexing, and strides."""

from __future__ import annotations

import numpy as np
import torch
from torch.utils._python_dispatch import _disable_current_modes

from .table import Derivative, aten, conj, definition, linear, rule, symmetric


def crop(x, shape):
    """The corner of `x` that an index of that shape reads."""
    for d, n in enumerate(shape):
        x = x if x.shape[d] == n else x.narrow(d, 0, n)
    return x


def pad_to(x, shape):
    """Zeros where `x` is smaller than `shape`: what an index didn't read."""
    if x.shape == shape:
        return x
    return aten.constant_pad_nd(x, [p for n, m in zip(reversed(shape), reversed(x.shape)) for p in (0, n - m)], 0)


@rule("scatter_reduce.two")
def scatter_reduce(y, x, dim, index, src, reduce, *, include_self=True):
    """y = reduction of x and of the src that index sends there: dy = slope(x) dx + scatter_add(slope(src) dsrc)."""
    read = crop(src, index.shape) if src.dim() else src
    add = lambda z, s: z.scatter_add(dim, index, s)

    def slopes():
        if reduce == "sum":
            at_x, at_src = torch.ones_like(x), torch.ones_like(read)
        elif reduce == "mean":
            n = add(torch.ones_like(x) if include_self else torch.zeros_like(x), torch.ones_like(read))
            n = torch.where(n == 0, 1, n)
            at_x = 1 / n
            at_src = at_x.gather(dim, index)
        elif reduce == "prod":
            at_x, at_src = _other_factors(x if include_self else torch.ones_like(x), dim, index, read)
        else:
            hit_x, hit = (x == y).to(y.dtype), (read == y.gather(dim, index)).to(y.dtype)
            if not include_self:
                hit_x = hit_x.scatter(dim, index, 0.0)
            n = add(hit_x, hit)
            share = 1 / torch.where(n == 0, 1, n)
            at_x, at_src = hit_x * share, hit * share.gather(dim, index)
        return (at_x if include_self else at_x.scatter(dim, index, 0.0)), at_src

    shape = src.shape
    return (
        Derivative(lambda g: g * conj(slopes()[0]), lambda t: t * slopes()[0]),
        None,
        None,
        Derivative(
            lambda g: pad_to(g.gather(dim, index) * conj(slopes()[1]), shape),
            lambda t: add(torch.zeros_like(y), (crop(t, index.shape) if t.dim() else t) * slopes()[1]),
        ),
    )


def _other_factors(x, dim, index, read):
    """For each factor of each product that scatter_reduce forms, the product of the others, by multiplications alone:
    exact where factors are zero, in every order of derivative. The factors are sorted by product, and within each
    product what comes before is multiplied by what comes after."""
    if not index.dim():
        return read.expand(x.shape), x.expand(read.shape)
    region = list(index.shape)
    region[dim] = x.shape[dim]
    part = crop(x, region)
    own = torch.arange(x.shape[dim], device=x.device).reshape([-1] + [1] * (x.dim() - 1 - dim % x.dim()))
    key = torch.cat([own.expand(region), index], dim).movedim(dim, -1)
    key, order = torch.sort(key, dim=-1, stable=True)
    factors = torch.cat([part, read], dim).movedim(dim, -1).gather(-1, order)
    before = _product_before(factors, key)
    after = _product_before(factors.flip(-1), key.flip(-1)).flip(-1)
    others = torch.zeros_like(factors).scatter(-1, order, before * after).movedim(-1, dim)
    at_x, at_src = others.split_with_sizes([x.shape[dim], index.shape[dim]], dim)
    return 1 + pad_to(at_x - 1, x.shape), at_src


def _product_before(x, key):
    """The product of the elements before each one that share its key, along the last dimension, by doubling."""
    one = torch.ones_like(x[..., :1])
    same = lambda step: key[..., step:] == key[..., :-step]
    y = torch.cat([one, torch.where(same(1), x[..., :-1], 1)], -1)
    step = 1
    while step < x.shape[-1]:
        y = torch.cat([y[..., :step], y[..., step:] * torch.where(same(step), y[..., :-step], 1)], -1)
        step *= 2
    return y


@definition("index_reduce")
def index_reduce(x, dim, index, source, reduce, *, include_self=True):
    lines = [1] * source.dim()
    if lines:
        lines[dim] = -1
    index = index.reshape(lines).expand(source.shape)
    reduce = {"prod": "prod", "mean": "mean", "amax": "amax", "amin": "amin"}[reduce]
    return aten.scatter_reduce.two(x, dim, index, source, reduce, include_self=include_self)


@definition("segment_reduce")
def segment_reduce(data, reduce, *, lengths=None, indices=None, offsets=None, axis=0, unsafe=False, initial=None):
    if offsets is None:
        starts, ends = lengths.cumsum(-1) - lengths, lengths.cumsum(-1)
    else:
        starts, ends = offsets[..., :-1], offsets[..., 1:]
    where = torch.arange(data.shape[axis], device=data.device).expand(*data.shape[:axis], -1).contiguous()
    segment = torch.searchsorted(ends.contiguous(), where, right=True)
    trailing = data.shape[axis + 1 :]
    segment = segment.reshape(*segment.shape, *[1] * len(trailing)).expand(data.shape)
    empty = {"sum": 0.0, "mean": 0.0, "prod": 1.0, "max": -torch.inf, "min": torch.inf}[reduce]
    shape = (*data.shape[:axis], starts.shape[-1] + 1, *trailing)  # one more, for what lies behind the last segment
    start = data.new_full(shape, empty if initial is None else initial)
    how = {"sum": "sum", "mean": "sum", "prod": "prod", "max": "amax", "min": "amin"}[reduce]
    out = start.scatter_reduce(axis, segment, data, how).narrow(axis, 0, starts.shape[-1])
    if reduce != "mean":
        return out
    n = (ends - starts).reshape(*starts.shape, *[1] * len(trailing)).to(data.dtype)
    return out / n if initial is None else torch.where(n == 0, initial, out / n.clamp(min=1))


# ---- masks


@rule("masked_select")
def masked_select(y, x, mask):
    shape = torch.broadcast_shapes(x.shape, mask.shape)
    return linear(lambda g: g.new_zeros(shape).masked_scatter(mask, g))


@rule("masked_scatter")
def masked_scatter(y, x, mask, source):
    shape = source.shape
    clear = lambda g: g.masked_fill(mask, 0)

    def pull_source(g):
        if shape.numel() == 0:
            return g.new_zeros(shape)
        # The n-th true place of the mask took the n-th element of the source.
        flat = mask.expand(g.shape).reshape(-1)
        order = (flat.cumsum(0) - 1).clamp(min=0)
        g = g.reshape(-1) * flat.to(g.dtype)
        return g.new_zeros(shape.numel()).index_add(0, order, g).reshape(shape)

    return (
        symmetric(clear),
        None,
        Derivative(pull_source, lambda t: torch.zeros_like(y).masked_scatter(mask, t)),
    )


# ---- one flat index


@rule("take")
def take(y, x, index):
    shape = x.shape
    return linear(lambda g: g.new_zeros(shape).put(index, g, True))


@rule("put")
def put(y, x, index, source, accumulate=False):
    shape = source.shape
    clear = lambda g: g if accumulate else g.put(index, g.new_zeros(shape))
    return (
        symmetric(clear),
        None,
        Derivative(
            lambda g: g.take(index).reshape(shape), lambda t: torch.zeros_like(y).put(index, t, accumulate)
        ),
    )


# ---- strides


def _flat_index(x, size, stride, offset):
    """For each element of a strided view of x's memory, which element of x (in reading order) it is, and -1 where it
    isn't one."""
    start = x.storage_offset()
    mine, wanted = _spots(x.shape, x.stride(), start), _spots(size, stride, start if offset is None else offset)
    table = np.full(max(mine.max(initial=0), wanted.max(initial=0)) + 1, -1)
    table[mine.reshape(-1)] = np.arange(mine.size)
    with _disable_current_modes():  # a constant, known from shapes and strides alone
        return torch.from_numpy(np.asarray(table[wanted])).to(x.device)


def _spots(size, stride, start):
    """The places in memory of a strided tensor's elements."""
    spots = np.full(tuple(size), start)
    for d, (n, s) in enumerate(zip(size, stride)):
        spots = spots + (np.arange(n) * s).reshape([-1] + [1] * (len(size) - 1 - d))
    return spots


@rule("as_strided")
def as_strided(y, x, size, stride, storage_offset=None):
    shape = x.shape
    index = _flat_index(x, size, stride, storage_offset)

    def vjp(g):
        flat, seen = index.reshape(-1), (index >= 0).to(g.dtype)
        g = (g * seen).reshape(-1)
        return g.new_zeros(shape.numel()).index_add(0, flat.clamp(min=0), g).reshape(shape)

    return Derivative(vjp, lambda t: t.take(index.clamp(min=0)) * (index >= 0).to(t.dtype))


@rule("as_strided_scatter")
def as_strided_scatter(y, x, src, size, stride, storage_offset=None):
    index = _flat_index(x, size, stride, storage_offset)
    place = lambda base, s: base.reshape(-1).index_put([index.reshape(-1)], s.reshape(-1)).reshape(base.shape)
    clear = lambda g: place(g, g.new_zeros(size))
    return (
        symmetric(clear),
        Derivative(lambda g: g.take(index), lambda t: place(torch.zeros_like(y), t)),
    )
