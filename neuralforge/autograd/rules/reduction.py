"""Sums, means, norms, extrema, softmax, scans."""

from __future__ import annotations

import math

import torch

from .table import Derivative, aten, conj, definition, identity, linear, rule


def keep_dims(x, dim, keepdim, ndim):
    """A reduced tensor with its reduced dimensions back, as size one. `dim` None or empty: all of them."""
    if keepdim or ndim == 0:
        return x
    dims = range(ndim) if dim is None or dim == [] else [d % ndim for d in ([dim] if isinstance(dim, int) else dim)]
    for d in sorted(dims):
        x = x.unsqueeze(d)
    return x


def count(shape, dim):
    """How many elements are reduced into one."""
    dims = range(len(shape)) if dim is None or dim == [] else ([dim] if isinstance(dim, int) else dim)
    return math.prod(shape[d] for d in dims) if shape else 1


@rule("sum")
def sum(y, x, dim=None, keepdim=False, *, dtype=None):
    shape = x.shape
    return linear(lambda g: keep_dims(g, dim, keepdim, len(shape)).expand(shape))


@rule("mean")
def mean(y, x, dim=None, keepdim=False, *, dtype=None):
    shape = x.shape
    return linear(lambda g: (keep_dims(g, dim, keepdim, len(shape)) / count(shape, dim)).expand(shape))


@rule("var.correction")
def var(y, x, dim=None, *, correction=None, keepdim=False):
    freedom = count(x.shape, dim) - (1 if correction is None else correction)
    factor = 2 / freedom if freedom > 0 else math.inf
    centred = lambda: x - (x.mean() if dim is None or dim == [] else x.mean(dim, keepdim=True))
    return Derivative(
        lambda g: keep_dims(g, dim, keepdim, x.dim()) * factor * centred(),
        lambda t: _sum(torch.real(conj(centred()) * t) * factor, dim, keepdim),
    )


@rule("std.correction")
def std(y, x, dim=None, *, correction=None, keepdim=False):
    # Flat where all numbers are equal, as in PyTorch.
    of_variance = lambda z: z / torch.where(y == 0, math.inf, 2 * y)
    variance = var(None, x, dim, correction=correction, keepdim=keepdim)
    return Derivative(lambda g: variance.vjp(of_variance(g)), lambda t: of_variance(variance.jvp(t)))


@definition("std_mean.correction")
def std_mean(x, dim=None, *, correction=None, keepdim=False):
    return aten.std.correction(x, dim, correction=correction, keepdim=keepdim), aten.mean.dim(x, dim, keepdim)


@definition("var_mean.correction")
def var_mean(x, dim=None, *, correction=None, keepdim=False):
    return aten.var.correction(x, dim, correction=correction, keepdim=keepdim), aten.mean.dim(x, dim, keepdim)


def _sum(x, dim, keepdim):
    if dim is None or dim == []:
        total = x.sum()
        return total.reshape([1] * x.dim()) if keepdim else total
    return x.sum(dim, keepdim=keepdim)


@rule("amax", "amin")
def amax(y, x, dim=(), keepdim=False):
    # Equal extrema share the derivative, as in PyTorch.
    dims = list(dim)

    def weights():
        mask = (x == keep_dims(y, dims, keepdim, x.dim())).to(x.dtype)
        return mask / _sum(mask, dims, True)

    return Derivative(
        lambda g: keep_dims(g, dims, keepdim, x.dim()) * weights(), lambda t: _sum(t * weights(), dims, keepdim)
    )


@rule("max.dim", "min.dim", "median.dim", "nanmedian.dim", "mode")
def selected(out, x, dim=-1, keepdim=False, scatter=torch.Tensor.scatter_):
    """Of operators that select elements along `dim`, each once, and give their indices too."""
    index, shape = keep_dims(out[1], dim, keepdim, x.dim()), x.shape
    if not shape:
        return Derivative(lambda gs: gs[0], lambda t: (t, None))

    def jvp(t):
        t = t.gather(dim, index)
        return (t if keepdim else t.squeeze(dim)), None

    return Derivative(
        lambda gs: scatter(gs[0].new_zeros(shape), dim, index, keep_dims(gs[0], dim, keepdim, len(shape))), jvp
    )


@rule("kthvalue")
def kthvalue(out, x, k, dim=-1, keepdim=False):
    return selected(out, x, dim, keepdim)


@rule("max", "min", "median", "nanmedian")
def extreme(y, x):
    def weights():
        mask = (x == y) | (x.isnan() & y.isnan())
        return mask.to(x.dtype) / mask.sum()

    return Derivative(lambda g: g * weights(), lambda t: (t * weights()).sum())


def norm_slope(n, x, ord, dim):
    """d|x|_ord / dx, given the norm with its reduced dimensions kept; zero where the norm is."""
    if ord == 0:
        return torch.zeros_like(x)
    if ord == 1:
        return x.sgn()
    if math.isinf(ord):
        mask = (x.abs() == n).to(n.dtype)
        return x.sgn() * (mask / _sum(mask, dim, True))
    zero = n == 0
    n = torch.where(zero, 1, n)
    if ord == 2:
        return torch.where(zero, 0, x / n)
    if ord > 2:
        return torch.where(zero, 0, x * x.abs() ** (ord - 2) / n ** (ord - 1))
    power = torch.where(x == 0, 1, x.abs()) ** (ord - 1)
    return torch.where(zero, 0, x.sgn() * power / n ** (ord - 1))


@rule("linalg_vector_norm")
def vector_norm(y, x, ord=2, dim=None, keepdim=False, *, dtype=None):
    slope = lambda: norm_slope(keep_dims(y, dim, keepdim, x.dim()), x, ord, dim)
    return Derivative(
        lambda g: keep_dims(g, dim, keepdim, x.dim()) * slope(),
        lambda t: _sum(torch.real(conj(slope()) * t), dim, keepdim),
    )


@rule("logsumexp")
def logsumexp(y, x, dim, keepdim=False):
    weights = lambda: (x - _finite(keep_dims(y, dim, keepdim, x.dim()))).exp()
    return Derivative(
        lambda g: keep_dims(g, dim, keepdim, x.dim()) * conj(weights()), lambda t: _sum(t * weights(), dim, keepdim)
    )


def _finite(x):
    """Infinities set to zero: a row of -inf has no share for anyone."""
    if x.is_complex():
        return x
    return torch.where(x.abs() == math.inf, 0, x)


@rule("_softmax")
def softmax(y, x, dim, half_to_float=False):
    # The fused backward operators have definitions, so they differentiate again.
    dtype = x.dtype
    pull = lambda g: aten._softmax_backward_data(g, y, dim, dtype)
    return Derivative(pull, lambda t: pull(t.to(y.dtype)).to(y.dtype))


@rule("_safe_softmax")
def safe_softmax(y, x, dim, dtype=None):
    return softmax(y, x, dim)


@rule("_log_softmax")
def log_softmax(y, x, dim, half_to_float=False):
    dtype = x.dtype
    return Derivative(
        lambda g: aten._log_softmax_backward_data(g, y, dim, dtype),
        lambda t: t.to(y.dtype) - (t * y.exp()).sum(dim, keepdim=True),
    )


@rule("cummax", "cummin")
def cummax(out, x, dim):
    return selected(out, x, dim, True, torch.Tensor.scatter_add_)  # an element may be selected many times


@definition("logcumsumexp")
def logcumsumexp(x, dim):
    """By doubling: log2(n) steps of logaddexp, each stable, and so are their derivatives."""
    given, n = x, x.shape[dim] if x.dim() else 1
    step = 1
    while step < n:
        moved = torch.logaddexp(x.narrow(dim, step, n - step), x.narrow(dim, 0, n - step))
        x = torch.cat([x.narrow(dim, 0, step), moved], dim)
        step *= 2
    if x.is_complex():  # the branch of the logarithm is the operator's own
        own = torch.imag(aten.logcumsumexp(given.detach(), dim))
        return x + 2j * math.pi * ((own - torch.imag(x)) / (2 * math.pi)).round()
    return x


@rule("cumsum")
def cumsum(y, x, dim, *, dtype=None):
    return linear(lambda g: g.flip(dim).cumsum(dim).flip(dim) if g.dim() else g)


@rule("cumprod")
def cumprod(y, x, dim, *, dtype=None):
    # Of y_i = x_i y_(i-1), exact where elements are zero: the cotangents s_i = g_i + x_(i+1) s_(i+1) of the products, the
    # tangents t_i = x_i t_(i-1) + dx_i y_(i-1).
    if x.dim() == 0:
        return identity
    shifted = lambda v, by, fill: _shifted(v, by, fill, dim)
    return Derivative(
        lambda g: _recurrence(conj(shifted(x, 1, 0)), g, 1, dim) * conj(shifted(y, -1, 1)),
        lambda t: _recurrence(x, t * shifted(y, -1, 1), -1, dim),
    )


def _shifted(x, by, fill, dim):
    """Element i + by in place of element i."""
    n = x.shape[dim]
    by = max(-n, min(n, by))
    edge = torch.full_like(x.narrow(dim, 0, abs(by)), fill)
    return torch.cat([x.narrow(dim, by, n - by), edge] if by > 0 else [edge, x.narrow(dim, 0, n + by)], dim)


def _recurrence(a, b, step, dim):
    """s with s_i = b_i + a_i s_(i + step), by doubling."""
    while abs(step) < b.shape[dim]:
        b = b + a * _shifted(b, step, 0, dim)
        a = a * _shifted(a, step, 0, dim)
        step *= 2
    return b


@rule("prod", "prod.dim_int")
def prod(y, x, dim=None, keepdim=False, *, dtype=None):
    def others():
        """The product of all other elements along `dim`, exact where some are zero: products of what comes before
        and of what comes after."""
        flat = x.reshape(-1) if dim is None else x.movedim(dim, -1)
        if dtype is not None:
            flat = flat.to(dtype)
        ones = torch.ones_like(flat[..., :1])
        before = torch.cat([ones, flat[..., :-1]], -1).cumprod(-1)
        after = torch.cat([ones, flat.flip(-1)[..., :-1]], -1).cumprod(-1).flip(-1)
        found = before * after
        return found.reshape(x.shape) if dim is None else found.movedim(-1, dim)

    if x.dim() == 0:
        return identity
    return Derivative(
        lambda g: keep_dims(g, dim, keepdim, x.dim()) * conj(others()), lambda t: _sum(t * others(), dim, keepdim)
    )
