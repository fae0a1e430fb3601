"""Special functions: gamma, error and Bessel functions."""

from __future__ import annotations

import math

import torch

from .table import diagonal, rule


@rule("erf")
def erf(y, x):
    return diagonal(lambda: (2 / math.sqrt(math.pi)) * (-x * x).exp())


@rule("erfc")
def erfc(y, x):
    return diagonal(lambda: (-2 / math.sqrt(math.pi)) * (-x * x).exp())


@rule("special_erfcx")
def erfcx(y, x):
    return diagonal(lambda: 2 * x * y - 2 / math.sqrt(math.pi))


@rule("erfinv")
def erfinv(y, x):
    return diagonal(lambda: (math.sqrt(math.pi) / 2) * (y * y).exp())


@rule("special_ndtri")
def ndtri(y, x):
    return diagonal(lambda: math.sqrt(2 * math.pi) * (y * y / 2).exp())


@rule("special_log_ndtr")
def log_ndtr(y, x):
    return diagonal(lambda: math.sqrt(2 / math.pi) / torch.special.erfcx(x * -math.sqrt(0.5)))


@rule("lgamma")
def lgamma(y, x):
    return diagonal(lambda: x.digamma())


@rule("digamma")
def digamma(y, x):
    return diagonal(lambda: torch.polygamma(1, x))


@rule("polygamma")
def polygamma(y, n, x):
    return None, diagonal(lambda: torch.polygamma(n + 1, x))


@rule("i0")
def i0(y, x):
    return diagonal(lambda: torch.special.i1(x))


@rule("special_i0e")
def i0e(y, x):
    return diagonal(lambda: torch.special.i1e(x) - x.sgn() * y)


@rule("special_i1")
def i1(y, x):
    return diagonal(lambda: _at_zero(x, lambda x: x.i0() - torch.special.i1(x) / x))


@rule("special_i1e")
def i1e(y, x):
    return diagonal(lambda: _at_zero(x, lambda x: torch.special.i0e(x) - torch.special.i1e(x) * (x.sgn() + 1 / x)))


def _at_zero(x, slope):
    """The slope of a first-order Bessel function, which is 1/2 at zero."""
    tiny = x.abs() <= torch.finfo(x.dtype).eps
    return torch.where(tiny, 0.5, slope(torch.where(tiny, torch.finfo(x.dtype).eps, x)))
