"""Choices among elements: masks, maxima, bounds."""

from __future__ import annotations

import torch

from .table import Derivative, rule


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
    share = lambda x, other: lambda g: _share(g, x < other, x == other)
    return Derivative(share(a, b), share(a, b)), Derivative(share(b, a), share(b, a))


@rule("minimum", "fmin")
def minimum(y, a, b):
    share = lambda x, other: lambda g: _share(g, x > other, x == other)
    return Derivative(share(a, b), share(a, b)), Derivative(share(b, a), share(b, a))


def _share(g, loses, ties):
    """Equal arguments share the derivative, as in PyTorch."""
    return torch.where(ties, g / 2, g).masked_fill(loses, 0)


@rule("clamp", "clamp.Tensor")
def clamp(y, x, low=None, high=None):
    where = lambda mask: (lambda g: torch.where(mask(), g, 0))
    if low is None or high is None:
        inside = lambda: x <= high if low is None else x >= low
    else:
        inside = lambda: (x >= low) & (x <= high)
    at_low = where(lambda: x < low if high is None else (x < low) & (low < high))
    at_high = where(lambda: x > high if low is None else (x > high) | (low > high))
    return Derivative(where(inside), where(inside)), Derivative(at_low, at_low), Derivative(at_high, at_high)
