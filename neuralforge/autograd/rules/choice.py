"""Choices among elements: masks, maxima, bounds."""

from __future__ import annotations

import torch

from .table import rule, symmetric


@rule("where.self", "where.ScalarSelf", "where.ScalarOther", "where.Scalar")
def where(y, mask, a, b):
    return None, symmetric(lambda g: torch.where(mask, g, 0)), symmetric(lambda g: torch.where(mask, 0, g))


@rule("masked_fill")
def masked_fill(y, x, mask, value):
    return symmetric(lambda g: g.masked_fill(mask, 0)), None, symmetric(lambda g: torch.where(mask, g, 0))


@rule("maximum")
def maximum(y, a, b):
    share = lambda x, other: symmetric(lambda g: _share(g, x < other, x == other))
    return share(a, b), share(b, a)


@rule("minimum")
def minimum(y, a, b):
    share = lambda x, other: symmetric(lambda g: _share(g, x > other, x == other))
    return share(a, b), share(b, a)


def _share(g, loses, ties):
    """Equal arguments share the derivative, as in PyTorch."""
    return torch.where(ties, g / 2, g).masked_fill(loses, 0)


@rule("fmax")
def fmax(y, a, b):
    return _chosen(lambda: (a >= b) | b.isnan())


@rule("fmin")
def fmin(y, a, b):
    return _chosen(lambda: (a <= b) | b.isnan())


def _chosen(first):
    """One argument is taken, and NaN only beside NaN."""
    return symmetric(lambda g: torch.where(first(), g, 0)), symmetric(lambda g: torch.where(first(), 0, g))


@rule("clamp", "clamp.Tensor")
def clamp(y, x, low=None, high=None):
    where = lambda mask: symmetric(lambda g: torch.where(mask(), g, 0))
    if low is None or high is None:
        inside = lambda: x <= high if low is None else x >= low
    else:
        inside = lambda: (x >= low) & (x <= high)
    at_low = where(lambda: x < low if high is None else (x < low) & (low < high))
    at_high = where(lambda: x > high if low is None else (x > high) | (low > high))
    return where(inside), at_low, at_high
