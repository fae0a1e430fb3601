"""Views, permutations, joining and splitting: all linear, so the adjoint is the whole rule."""

from __future__ import annotations

import torch

from .table import Derivative, aten, conj, linear, rule, symmetric


@rule("view", "_unsafe_view", "reshape", "_reshape_alias", "squeeze", "unsqueeze")
def view(y, x, *args):
    shape, out_shape = x.shape, y.shape
    # The tangent may have other strides than the value, so that a view of it isn't always possible.
    return Derivative(lambda g: g.reshape(shape), lambda t: t.reshape(out_shape))


@rule("expand")
def expand(y, x, size, *, implicit=False):
    return linear(lambda g: g)  # the tape sums what was broadcast


@rule("t")
def t(y, x):
    return linear(lambda g: g.t())


@rule("transpose")
def transpose(y, x, dim0, dim1):
    return linear(lambda g: g.transpose(dim0, dim1))


@rule("permute")
def permute(y, x, dims):
    order = [d % len(dims) for d in dims]
    return linear(lambda g: g.permute([order.index(i) for i in range(len(order))]))


@rule("slice")
def slice(y, x, dim=0, start=None, end=None, step=1):
    shape = x.shape
    return linear(lambda g: aten.slice_backward(g, shape, dim, *_bounds(shape[dim], start, end), step))


def _bounds(n, start, end):
    return 0 if start is None else start, n if end is None else end


@rule("slice_backward")
def slice_backward(y, g, sizes, dim, start, end, step):
    return linear(lambda h: aten.slice.Tensor(h, dim, start, end, step))


@rule("select")
def select(y, x, dim, index):
    shape = x.shape
    return linear(lambda g: aten.select_backward(g, shape, dim, index))


@rule("select_backward")
def select_backward(y, g, sizes, dim, index):
    return linear(lambda h: h.select(dim, index))


@rule("diagonal")
def diagonal(y, x, offset=0, dim1=0, dim2=1):
    shape = x.shape
    return linear(lambda g: aten.diagonal_backward(g, shape, offset, dim1, dim2))


@rule("diagonal_backward")
def diagonal_backward(y, g, sizes, offset, dim1, dim2):
    return linear(lambda h: h.diagonal(offset, dim1, dim2))


@rule("slice_scatter")
def slice_scatter(y, x, src, dim=0, start=None, end=None, step=1):
    shape = src.shape
    return (
        symmetric(lambda g: aten.slice_scatter(g, g.new_zeros(shape), dim, start, end, step)),
        Derivative(
            lambda g: aten.slice.Tensor(g, dim, start, end, step),
            lambda t: aten.slice_scatter(torch.zeros_like(y), t, dim, start, end, step),
        ),
    )


@rule("select_scatter")
def select_scatter(y, x, src, dim, index):
    shape = src.shape
    return (
        symmetric(lambda g: aten.select_scatter(g, g.new_zeros(shape), dim, index)),
        Derivative(lambda g: g.select(dim, index), lambda t: aten.select_scatter(torch.zeros_like(y), t, dim, index)),
    )


@rule("diagonal_scatter")
def diagonal_scatter(y, x, src, offset=0, dim1=0, dim2=1):
    shape = src.shape
    return (
        symmetric(lambda g: aten.diagonal_scatter(g, g.new_zeros(shape), offset, dim1, dim2)),
        Derivative(
            lambda g: g.diagonal(offset, dim1, dim2),
            lambda t: aten.diagonal_scatter(torch.zeros_like(y), t, offset, dim1, dim2),
        ),
    )


@rule("cat")
def cat(y, tensors, dim=0):
    shapes = [x.shape for x in tensors]

    def vjp(g):
        # A legacy empty tensor of shape [0] joins anything and takes nothing.
        sizes = [0 if len(s) == 1 and s[0] == 0 and g.dim() != 1 else s[dim] for s in shapes]
        pieces = g.split_with_sizes(sizes, dim)
        return [p.reshape(s) for p, s in zip(pieces, shapes)]

    return linear(vjp)


@rule("stack")
def stack(y, tensors, dim=0):
    return linear(lambda g: list(g.unbind(dim)))


@rule("split", "split_with_sizes", "unbind", "unsafe_split", "split_with_sizes_copy")
def split(out, x, *args):
    joined = torch.stack if all(p.dim() != x.dim() for p in out) else torch.cat
    if joined is torch.stack:
        dim = args[0] if args else 0
    else:
        dim = args[1] if len(args) > 1 else 0
    shapes, dtype, device = [p.shape for p in out], x.dtype, x.device

    def vjp(gs):
        return joined([torch.zeros(s, dtype=dtype, device=device) if g is None else g for g, s in zip(gs, shapes)], dim)

    return linear(vjp)


@rule("flip")
def flip(y, x, dims):
    return linear(lambda g: g.flip(dims))


@rule("roll")
def roll(y, x, shifts, dims=()):
    return linear(lambda g: g.roll([-s for s in shifts], dims))


@rule("tril")
def tril(y, x, diagonal=0):
    return linear(lambda g: g.tril(diagonal))


@rule("triu")
def triu(y, x, diagonal=0):
    return linear(lambda g: g.triu(diagonal))


@rule("constant_pad_nd")
def constant_pad_nd(y, x, pad, value=0):
    inverse = [-p for p in pad]
    return Derivative(
        lambda g: aten.constant_pad_nd(g, inverse, 0), lambda t: aten.constant_pad_nd(t, pad, 0)
    )


@rule("repeat")
def repeat(y, x, repeats):
    shape = x.shape

    def vjp(g):
        lead = len(repeats) - len(shape)
        split, dims = list(repeats[:lead]), list(range(lead))
        for r, n in zip(repeats[lead:], shape):
            dims.append(len(split))
            split += [r, n]
        return g.reshape(split).sum(dims) if dims else g

    return linear(vjp)


@rule("_conj", "_conj_physical", "conj_physical", "resolve_conj")
def _conj(y, x):
    return symmetric(conj)


@rule("view_as_real")
def view_as_real(y, x):
    return linear(lambda g: torch.view_as_complex(g.contiguous()))


@rule("view_as_complex")
def view_as_complex(y, x):
    return Derivative(
        lambda g: torch.view_as_real(g.resolve_conj()), lambda t: torch.view_as_complex(t.contiguous())
    )
