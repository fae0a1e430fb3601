"""Gathering and scattering by index."""

from __future__ import annotations

import torch

from .reduction import selected
from .scatter import pad_to
from .table import Derivative, aten, identity, linear, rule, symmetric


@rule("embedding")
def embedding(y, weight, index, padding_idx=-1, scale_grad_by_freq=False, sparse=False):
    rows = weight.shape[0]
    return Derivative(
        lambda g: aten.embedding_dense_backward(g, index, rows, padding_idx, scale_grad_by_freq),
        lambda t: aten.embedding(t, index),
    )


@rule("embedding_dense_backward")
def embedding_dense_backward(y, g, index, rows, padding_idx, scale_grad_by_freq):
    def vjp(h):
        if padding_idx >= 0:
            h = h * (torch.arange(rows, device=h.device) != padding_idx).unsqueeze(-1).to(h.dtype)
        if scale_grad_by_freq:
            flat = index.reshape(-1)
            n = h.new_zeros(rows).index_add(0, flat, h.new_ones(flat.shape))
            h = h / n.clamp(min=1).unsqueeze(-1)
        return aten.embedding(h, index)

    return linear(vjp)


@rule("gather")
def gather(y, x, dim, index, *, sparse_grad=False):
    shape = x.shape
    return linear(lambda g: g.new_zeros(shape).scatter_add(dim, index, g))


@rule("index_select")
def index_select(y, x, dim, index):
    shape = x.shape
    if not shape:
        return linear(lambda g: g.sum())
    return linear(lambda g: g.new_zeros(shape).index_add(dim, index, g))


@rule("index.Tensor", "_unsafe_index.Tensor")
def index(y, x, indices):
    shape = x.shape
    return linear(lambda g: aten.index_put(g.new_zeros(shape), indices, g, True))


@rule("index_put", "_unsafe_index_put")
def index_put(y, x, indices, values, accumulate=False):
    clear = lambda g: g if accumulate else aten.index_put(g, indices, g.new_zeros(()))
    single = values.numel() == 1 and any(i is not None and i.dtype == torch.bool for i in indices)

    def pull(g):
        if single:  # x[mask] = number: a sum, so as not to need the mask's count
            return (g * aten.index_put(torch.zeros_like(g), indices, g.new_ones(()))).sum()
        return aten.index.Tensor(g, indices)

    return (
        symmetric(clear),
        None,
        Derivative(pull, lambda t: aten.index_put(torch.zeros_like(y), indices, t, accumulate)),
    )


@rule("index_fill")
def index_fill(y, x, dim, index, value):
    clear = lambda g: g.index_fill(dim, index, 0)
    return (
        symmetric(clear),
        None,
        None,
        Derivative(
            lambda g: (g - clear(g)).sum(),
            lambda t: t * torch.zeros_like(y).index_fill(dim, index, 1),
        ),
    )


@rule("scatter_add")
def scatter_add(y, x, dim, index, src):
    shape = src.shape
    return (
        identity,
        None,
        None,
        Derivative(
            lambda g: pad_to(g.gather(dim, index), shape), lambda t: torch.zeros_like(y).scatter_add(dim, index, t)
        ),
    )


@rule("scatter.src", "scatter.value")
def scatter(y, x, dim, index, src):
    clear = lambda g: aten.scatter.value(g, dim, index, 0)
    rest = symmetric(clear)
    if not isinstance(src, torch.Tensor):
        return rest, None, None, None
    shape = src.shape
    return (
        rest,
        None,
        None,
        Derivative(
            lambda g: pad_to(g.gather(dim, index), shape), lambda t: torch.zeros_like(y).scatter(dim, index, t)
        ),
    )


@rule("index_add")
def index_add(y, x, dim, index, src, *, alpha=1):
    return (
        identity,
        None,
        None,
        Derivative(
            lambda g: g.index_select(dim, index) * alpha,
            lambda t: torch.zeros_like(y).index_add(dim, index, t, alpha=alpha),
        ),
    )


@rule("sort", "sort.stable")
def sort(out, x, *args, **kwargs):
    dim = kwargs.get("dim", next((a for a in args if type(a) is int), -1))
    return selected(out, x, dim, keepdim=True)


@rule("topk")
def topk(out, x, k, dim=-1, largest=True, sorted=True):
    return selected(out, x, dim, keepdim=True)
