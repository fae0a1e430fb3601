"""Operators that act element by element."""

from __future__ import annotations

import math

import torch

from .table import (
    Derivative,
    aten,
    conj,
    definition,
    diagonal,
    identity,
    linear,
    nondifferentiable,
    rule,
    symmetric,
)

# ---- arithmetic


@rule("add")
def add(y, a, b, *, alpha=1):
    return identity, Derivative(lambda g: _scale(g, alpha), lambda t: _scale(t, conj(alpha)))


@rule("sub")
def sub(y, a, b, *, alpha=1):
    return identity, Derivative(lambda g: _scale(g, -alpha), lambda t: _scale(t, -conj(alpha)))


@rule("rsub")
def rsub(y, a, b, alpha=1):
    return Derivative(lambda g: _scale(g, -alpha), lambda t: _scale(t, -conj(alpha))), identity


def _scale(x, factor):
    """A cotangent times the conjugate of the factor (so that a tangent passes the factor's conjugate)."""
    return x if factor == 1 else -x if factor == -1 else x * conj(factor)


@rule("mul")
def mul(y, a, b):
    return diagonal(lambda: b), diagonal(lambda: a)


@rule("div")
def div(y, a, b, *, rounding_mode=None):
    if rounding_mode is not None:
        return None
    return Derivative(lambda g: g / conj(b), lambda t: t / b), diagonal(lambda: -y / b)


@rule("lerp.Scalar", "lerp.Tensor")
def lerp(y, a, b, weight):
    return diagonal(lambda: 1 - weight), diagonal(lambda: weight), diagonal(lambda: b - a)


@rule("neg", "_neg_view")
def neg(y, x):
    return linear(lambda g: -g)


@rule("reciprocal")
def reciprocal(y, x):
    return diagonal(lambda: -y * y)


@rule("square")
def square(y, x):
    return diagonal(lambda: 2 * x)


@rule("sqrt")
def sqrt(y, x):
    return Derivative(lambda g: g / conj(2 * y), lambda t: t / (2 * y))


@rule("rsqrt")
def rsqrt(y, x):
    return diagonal(lambda: -0.5 * y * y * y)


@rule("pow.Tensor_Scalar")
def pow_scalar(y, x, n):
    return diagonal(lambda: 0.0 if n == 0 else n * x if n == 2 else n * x ** (n - 1))


@rule("pow.Tensor_Tensor")
def pow_tensor(y, x, n):
    # 0 ** 0 = 1 is flat in x; x ** 0 and 0 ** n (n > 0) are flat in n at x = 0.
    return (
        diagonal(lambda: torch.where(n == 0, 0, n * x ** torch.where(n == 0, 1, n - 1))),
        diagonal(lambda: torch.where((x == 0) & _nonnegative(n), 0, y * torch.log(torch.where(x == 0, 1, x)))),
    )


@rule("pow.Scalar")
def pow_base(y, x, n):
    if x == 0:
        return None, diagonal(lambda: torch.where(_nonnegative(n), 0, y * -math.inf))
    log = torch.log(torch.tensor(x, dtype=y.dtype, device=y.device))
    return None, diagonal(lambda: y * log)


def _nonnegative(n):
    return torch.real(n) >= 0 if n.is_complex() else n >= 0


# ---- exponentials, logarithms, trigonometry


@rule("logaddexp")
def logaddexp(y, a, b):
    return diagonal(lambda: _logistic(a, b)), diagonal(lambda: _logistic(b, a))


def _logistic(a, b):
    """exp(a) / (exp(a) + exp(b)), of infinities too."""
    d = torch.where((a == b) & a.isinf(), 0, a - b)
    if not d.is_complex():
        return d.sigmoid()
    first = torch.real(d) > 0
    e = torch.where(first, -d, d).exp()
    return torch.where(first, 1, e) / (1 + e)


@rule("logit")
def logit(y, x, eps=None):
    return symmetric(lambda g: aten.logit_backward(g, x, eps))


@rule("exp")
def exp(y, x):
    return diagonal(lambda: y)


@rule("exp2")
def exp2(y, x):
    return diagonal(lambda: y * math.log(2))


@rule("expm1")
def expm1(y, x):
    return diagonal(lambda: y + 1)


@rule("log")
def log(y, x):
    return Derivative(lambda g: g / conj(x), lambda t: t / x)


@rule("log2")
def log2(y, x):
    return diagonal(lambda: 1 / (x * math.log(2)))


@rule("log10")
def log10(y, x):
    return diagonal(lambda: 1 / (x * math.log(10)))


@rule("xlogy")
def xlogy(y, x, b):
    return _times_log(x, lambda one: torch.xlogy(one, b), b)


@rule("special_xlog1py")
def xlog1py(y, x, b):
    return _times_log(x, lambda one: torch.special.xlog1py(one, b), b + 1)


def _times_log(x, log, b):
    """Of x log(b), which is 0 at x = 0."""
    return diagonal(lambda: torch.where((x == 0) & (b <= 0), 0, log(torch.ones_like(x)))), diagonal(lambda: x / b)


@rule("special_entr")
def entr(y, x):
    return diagonal(lambda: -1 - x.log())


@rule("log1p")
def log1p(y, x):
    return Derivative(lambda g: g / conj(x + 1), lambda t: t / (x + 1))


@rule("sin")
def sin(y, x):
    return diagonal(lambda: x.cos())


@rule("cos")
def cos(y, x):
    return diagonal(lambda: -x.sin())


@rule("tan")
def tan(y, x):
    return diagonal(lambda: 1 + y * y)


@rule("sinc")
def sinc(y, x):
    return diagonal(lambda: torch.where(x == 0, 0, ((math.pi * x).cos() - y) / torch.where(x == 0, 1, x)))


@rule("sinh")
def sinh(y, x):
    return diagonal(lambda: x.cosh())


@rule("cosh")
def cosh(y, x):
    return diagonal(lambda: x.sinh())


@rule("asin")
def asin(y, x):
    return diagonal(lambda: (1 - x * x).rsqrt())


@rule("acos")
def acos(y, x):
    return diagonal(lambda: -(1 - x * x).rsqrt())


@rule("atan")
def atan(y, x):
    return diagonal(lambda: 1 / (x * x + 1))


@rule("asinh")
def asinh(y, x):
    return diagonal(lambda: (x * x + 1).rsqrt())


@rule("acosh")
def acosh(y, x):
    return diagonal(lambda: (x * x - 1).rsqrt())


@rule("atanh")
def atanh(y, x):
    return diagonal(lambda: 1 / (1 - x * x))


@rule("atan2")
def atan2(y, a, b):
    over = lambda n: torch.where((a == 0) & (b == 0), 0, n / (a * a + b * b))
    return diagonal(lambda: over(b)), diagonal(lambda: over(-a))


@rule("hypot")
def hypot(y, a, b):
    return diagonal(lambda: a / y), diagonal(lambda: b / y)


# ---- parts of numbers


@rule("abs")
def abs(y, x):
    if x.is_complex():
        return Derivative(lambda g: g * x.sgn(), lambda t: torch.real(conj(x.sgn()) * t))
    return diagonal(lambda: x.sgn())


@rule("sgn")
def sgn(y, x):
    if not x.is_complex():
        return None

    def across(t):  # what of a change is across the number, by its size
        size = x.abs()
        return torch.where(x == 0, 0, (t - y * torch.real(conj(y) * t)) / torch.where(size == 0, 1, size))

    return symmetric(across)


@rule("angle")
def angle(y, x):
    if not x.is_complex():
        return None
    turn = lambda: torch.where(x == 0, 0, x * 1j / (torch.real(x) ** 2 + torch.imag(x) ** 2))
    return Derivative(lambda g: g * turn(), lambda t: torch.real(conj(turn()) * t))


@rule("remainder")
def remainder(y, a, b):
    return identity, diagonal(lambda: -(a / b).floor())


@rule("fmod")
def fmod(y, a, b):
    return identity, diagonal(lambda: -(a / b).trunc())


@rule("nextafter")
def nextafter(y, a, b):
    return diagonal(lambda: (a != b).to(y.dtype)), None


@rule("frexp")
def frexp(out, x):
    exponent = out[1]
    slope = lambda: torch.exp2(-exponent.to(x.dtype))
    return Derivative(lambda gs: gs[0] * slope(), lambda t: (t * slope(), None))


# ---- dtype, copies, and what has no derivative


@rule("_to_copy", "clone", "alias", "lift_fresh", "lift_fresh_copy", "contiguous", "lift")
def copy(y, x, *args, **kwargs):
    dtype = y.dtype
    return Derivative(lambda g: g, lambda t: t.to(dtype) if dtype.is_complex or not t.is_complex() else t.real)


@definition("prims::convert_element_type")
def convert_element_type(x, dtype):
    """PyTorch's writes into an empty tensor."""
    return x.to(dtype)


@rule("copy")
def copy_into(y, x, source, non_blocking=False):
    return None, identity


@rule("fill.Tensor")
def fill(y, x, value):
    return None, identity


nondifferentiable(
    "detach", "floor", "ceil", "round", "trunc", "sign", "zeros_like", "ones_like", "full_like", "empty_like",
    "new_zeros", "new_ones", "new_full", "new_empty", "new_empty_strided", "rand_like", "randn_like", "bernoulli",
    "eq", "ne", "lt", "le", "gt", "ge", "isnan", "isinf", "isfinite", "logical_and", "logical_or", "logical_not",
    "logical_xor", "argmax", "argmin", "argsort", "fill.Scalar", "zero", "signbit", "floor_divide", "empty_strided",
    "heaviside", "isposinf", "isneginf", "any", "all", "uniform", "normal_functional", "exponential",
    "bucketize", "searchsorted", "count_nonzero", "nonzero", "multinomial", "randint_like", "poisson",
    "normal.Tensor_float", "normal.float_Tensor", "normal.Tensor_Tensor", "binomial",
)  # fmt: skip
