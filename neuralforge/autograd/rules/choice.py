"""Activations, and choices among elements: masks, maxima, bounds."""

from __future__ import annotations

import torch

from .table import Derivative, aten, diagonal, rule

# ---- activations


@rule("sigmoid")
def sigmoid(y, x):
    return diagonal(lambda: y * (1 - y))


@rule("relu")
def relu(y, x):
    return diagonal(lambda: (y > 0).to(y.dtype))


@rule("gelu")
def gelu(y, x, *, approximate="none"):
    slope = lambda g: aten.gelu_backward(g, x, approximate=approximate)
    return Derivative(slope, slope)


@rule("silu")
def silu(y, x):
    if x.is_complex():
        return diagonal(lambda: x.sigmoid() * (1 + x * (1 - x.sigmoid())))
    slope = lambda g: aten.silu_backward(g, x)
    return Derivative(slope, slope)


# ---- choosing


@rule("where.self", "where.ScalarSelf", "where.ScalarOther", "where.Scalar")
def where(y, mask, a, b):
    keep = lambda g: torch.where(mask, g, 0)
    drop = lambda g: torch.where(mask, 0, g)
    return None, Derivative(keep, keep), Derivative(drop, drop)


@rule("masked_fill")
def masked_fill(y, x, mask, value):
    keep = lambda g: g.masked_fill(mask, 0)
    return Derivative(keep, keep), None, Derivative(
        lambda g: torch.where(mask, g, 0), lambda t: torch.where(mask, t, 0)
    )


@rule("maximum", "fmax")
def maximum(y, a, b):
    # Equal arguments share the derivative, as in PyTorch.
    dtype = y.dtype
    return diagonal(lambda: _share(a > b, a == b, dtype)), diagonal(lambda: _share(b > a, a == b, dtype))


@rule("minimum", "fmin")
def minimum(y, a, b):
    dtype = y.dtype
    return diagonal(lambda: _share(a < b, a == b, dtype)), diagonal(lambda: _share(b < a, a == b, dtype))


def _share(wins, ties, dtype):
    return wins.to(dtype) + ties.to(dtype) / 2


@rule("clamp", "clamp.Tensor")
def clamp(y, x, low=None, high=None):
    shape, dtype, device = y.shape, y.dtype, y.device

    def inside():
        keep = torch.ones(shape, dtype=torch.bool, device=device)
        keep = keep if low is None else keep & (x >= low)
        return (keep if high is None else keep & (x <= high)).to(dtype)

    at_low = diagonal(lambda: ((x < low) & (True if high is None else low < high)).to(dtype))
    at_high = diagonal(lambda: ((x > high) | (False if low is None else low > high)).to(dtype))
    return diagonal(inside), at_low, at_high
