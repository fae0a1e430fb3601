"""Matrix products."""

from __future__ import annotations

from .table import Derivative, adjoint, conj, linear, rule


@rule("mm", "bmm")
def mm(y, a, b):
    return linear(lambda g: g @ adjoint(b)), linear(lambda g: adjoint(a) @ g)


@rule("mv")
def mv(y, a, b):
    return linear(lambda g: g.unsqueeze(-1) * conj(b)), linear(lambda g: adjoint(a).mv(g))


@rule("dot")
def dot(y, a, b):
    return linear(lambda g: g * conj(b)), linear(lambda g: g * conj(a))


@rule("vdot")
def vdot(y, a, b):
    return Derivative(lambda g: conj(g) * b, lambda t: t.vdot(b)), linear(lambda g: g * a)


@rule("addmm", "baddbmm")
def addmm(y, c, a, b, *, beta=1, alpha=1):
    return (
        Derivative(lambda g: _times(g, beta), lambda t: _times(t, beta)),
        Derivative(lambda g: _times(g @ adjoint(b), alpha), lambda t: _times(t @ b, alpha)),
        Derivative(lambda g: _times(adjoint(a) @ g, alpha), lambda t: _times(a @ t, alpha)),
    )


def _times(x, factor):
    return x if factor == 1 else x * conj(factor)
