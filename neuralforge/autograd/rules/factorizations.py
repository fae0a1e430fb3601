"""Matrix factorizations: LU, Cholesky, QR."""

from __future__ import annotations

import torch

from ...errors import DifferentiationError
from ...graph.source import user_line
from .table import Derivative, adjoint, aten, conj, definition, plus, rule


def _eye(n, like):
    return torch.eye(n, dtype=like.dtype, device=like.device)


def as_diagonal(x, like):
    """Vectors as diagonal matrices of another's dtype."""
    return torch.diag_embed(x.to(like.dtype))


def diagonal(x):
    return x.diagonal(0, -2, -1)


# ---- triangular factors


def _lu_derivative(p, l, u):
    """Tangents and cotangents of P L U = A, any shape: A is bordered by an identity to be square, which leaves the
    factors as they were. With K = L^-1 P^T dA U^-1, dL = L tril(K, -1) and dU = triu(K) U."""
    m, n = l.shape[-2], u.shape[-1]
    size = max(m, n)
    l_, u_ = _border(l, size), _border(u, size)
    solve = torch.linalg.solve_triangular

    def push(t):
        t = _embed(adjoint(p) @ t, size)
        k = solve(u_, solve(l_, t, upper=False, unitriangular=True), upper=True, left=False)
        return (l_ @ k.tril(-1))[..., : l.shape[-2], : l.shape[-1]], (k.triu() @ u_)[..., : u.shape[-2], : u.shape[-1]]

    def pull(gl, gu):
        k = plus(
            None if gl is None else (adjoint(l_) @ _embed(gl, size)).tril(-1),
            None if gu is None else (_embed(gu, size) @ adjoint(u_)).triu(),
        )
        k = solve(adjoint(l_), k, upper=True, unitriangular=True)
        return p @ solve(adjoint(u_), k, upper=False, left=False)[..., :m, :n]

    return push, pull


def _embed(x, size):
    return aten.constant_pad_nd(x, [0, size - x.shape[-1], 0, size - x.shape[-2]], 0)


def _border(x, size):
    """The matrix in the upper left corner of a square one, with ones on the rest of the diagonal."""
    k = min(x.shape[-2:])
    tail = torch.cat([x.new_zeros(k), x.new_ones(size - k)])
    return _embed(x, size) + torch.diag_embed(tail)


def _unpacked(lu):
    k = min(lu.shape[-2:])
    l = lu[..., :, :k].tril(-1)
    unit = torch.eye(l.shape[-2], k, dtype=lu.dtype, device=lu.device)
    return l + unit, lu[..., :k, :].triu()


@rule("linalg_lu_factor_ex")
def lu_factor_ex(out, a, *, pivot=True, check_errors=False):
    lu, pivots = out[:2]

    def derivative():
        p = aten.lu_unpack(lu.detach(), pivots, False, True)[0] if pivot else _eye(a.shape[-2], a)
        return _lu_derivative(p, *_unpacked(lu))

    def vjp(gs):
        k = min(a.shape[-2:])
        return derivative()[1](gs[0][..., :, :k].tril(-1), gs[0][..., :k, :].triu())

    def jvp(t):
        tl, tu = derivative()[0](t)
        m, n = a.shape[-2:]
        k = min(m, n)
        wide = aten.constant_pad_nd(tl, [0, n - k], 0)
        return wide + aten.constant_pad_nd(tu, [0, 0, 0, m - k], 0), None, None

    return Derivative(vjp, jvp)


@rule("linalg_lu")
def lu(out, a, *, pivot=True):
    p, l, u = out
    derivative = lambda: _lu_derivative(p if pivot else _eye(a.shape[-2], a), l, u)
    return Derivative(lambda gs: derivative()[1](gs[1], gs[2]), lambda t: (None, *derivative()[0](t)))


@rule("lu_unpack")
def lu_unpack(out, lu, pivots, unpack_data=True, unpack_pivots=True):
    if not unpack_data:
        return None
    m, n = lu.shape[-2:]
    k = min(m, n)

    def vjp(gs):
        return plus(
            None if gs[1] is None else aten.constant_pad_nd(gs[1].tril(-1), [0, n - k], 0),
            None if gs[2] is None else aten.constant_pad_nd(gs[2].triu(), [0, 0, 0, m - k], 0),
        )

    return Derivative(vjp, lambda t: (None, t[..., :, :k].tril(-1), t[..., :k, :].triu()))


@definition("linalg_lu_solve")
def lu_solve(lu, pivots, b, *, left=True, adjoint=False):
    if not left:  # X A = B is A^H X^H = B^H
        return _adjoint(lu_solve(lu, pivots, _adjoint(b), adjoint=not adjoint))
    p = aten.lu_unpack(lu.detach(), pivots, False, True)[0]
    l, u = _unpacked(lu)
    solve = torch.linalg.solve_triangular
    if adjoint:
        x = solve(_adjoint(u), b, upper=False)
        return p @ solve(_adjoint(l), x, upper=True, unitriangular=True)
    return solve(u, solve(l, _adjoint(p) @ b, upper=False, unitriangular=True), upper=True)


_adjoint = adjoint


@rule("linalg_cholesky_ex")
def cholesky_ex(out, a, *, upper=False, check_errors=False):
    pull, push = _cholesky_derivative(out[0], upper)
    return Derivative(lambda gs: pull(gs[0]), lambda t: (push(t), None))


@rule("cholesky")
def cholesky(y, a, upper=False):
    return Derivative(*_cholesky_derivative(y, upper))


def _cholesky_derivative(y, upper):
    """Murray 2016, https://arxiv.org/abs/1602.07527"""
    flip = adjoint if upper else lambda x: x
    solve = torch.linalg.solve_triangular
    half = lambda x: x.tril() - 0.5 * torch.diag_embed(diagonal(x))

    def pull(g):
        l = flip(y)
        k = half(adjoint(l) @ flip(g))
        k = (k + adjoint(k)) / 2
        k = solve(adjoint(l), k, upper=True)
        return solve(l, k, upper=False, left=False)

    def push(t):
        l = flip(y)
        t = (t + adjoint(t)) / 2
        k = solve(adjoint(l), solve(l, t, upper=False), upper=True, left=False)
        return flip(l @ half(k))

    return pull, push


@definition("cholesky_inverse")
def cholesky_inverse(l, upper=False):
    l = adjoint(l.triu()) if upper else l.tril()
    inverse = torch.linalg.solve_triangular(l, _eye(l.shape[-1], l), upper=False)
    return adjoint(inverse) @ inverse


@definition("cholesky_solve")
def cholesky_solve(b, l, upper=False):
    l = adjoint(l.triu()) if upper else l.tril()
    x = torch.linalg.solve_triangular(l, b, upper=False)
    return torch.linalg.solve_triangular(adjoint(l), x, upper=True)


# ---- orthogonal factors


@rule("linalg_qr")
def qr(out, a, mode="reduced"):
    """Walter and Lehmann 2018, https://arxiv.org/abs/1009.6112"""
    q, r = out
    m, n = a.shape[-2:]
    if mode == "r" or mode == "complete" and m > n:
        raise DifferentiationError(
            f"{user_line()}: linalg.qr with mode={mode!r} of a matrix of shape {tuple(a.shape)} has no derivative: "
            f"the columns it completes or leaves out aren't determined. Use mode='reduced'."
        )
    k = min(m, n)
    over_r = lambda x, h: torch.linalg.solve_triangular(
        adjoint(r[..., :k]) if h else r[..., :k], x, upper=not h, left=False
    )

    def vjp(gs):
        gq, gr = gs
        rest = None
        if n > m:  # the columns beyond the square are Q^H A
            if gr is not None:
                gq = plus(gq, a[..., k:] @ adjoint(gr[..., k:]))
                rest, gr = q @ gr[..., k:], gr[..., :k]
        c = plus(
            None if gr is None else r[..., :k] @ adjoint(gr), None if gq is None else -(adjoint(gq) @ q)
        )
        low = c.tril(-1)
        sym = low + adjoint(low) + as_diagonal(torch.real(diagonal(c)), c)
        g = over_r(plus(gq, q @ sym), True)
        if n > m:
            g = torch.cat([g, torch.zeros_like(a[..., k:]) if rest is None else rest], -1)
        return g

    def jvp(t):
        c = over_r(adjoint(q) @ t[..., :k], False)
        u = c.triu() + adjoint(c.tril(-1))
        if c.is_complex():
            u = u - as_diagonal(torch.imag(diagonal(c)), c) * 1j
        tr = u @ r[..., :k]
        tq = over_r(t[..., :k] - q @ tr, False)
        if n > m:
            tr = torch.cat([tr, adjoint(tq) @ a[..., k:] + adjoint(q) @ t[..., k:]], -1)
        return tq, tr

    return Derivative(vjp, jvp)


@definition("linalg_householder_product")
def householder_product(a, tau):
    m, n = a.shape[-2:]
    return _reflect(a, tau, torch.eye(m, n, dtype=a.dtype, device=a.device).expand(a.shape), False)


@definition("ormqr")
def ormqr(a, tau, c, left=True, transpose=False):
    if not left:  # C Q = (Q^H C^H)^H
        return adjoint(_reflect(a, tau, adjoint(c), not transpose))
    return _reflect(a, tau, c, transpose)


def _reflect(a, tau, c, transpose):
    """Q c, or Q^H c: Q is the product of the reflections 1 - tau v v^H, whose vectors lie below the diagonal of a."""
    k = tau.shape[-1]
    m = a.shape[-2]
    v = a[..., :, :k].tril(-1) + torch.eye(m, k, dtype=a.dtype, device=a.device)
    for i in range(k) if transpose else reversed(range(k)):
        column, scale = v[..., :, i : i + 1], tau[..., i, None, None]
        c = c - (conj(scale) if transpose else scale) * column @ (adjoint(column) @ c)
    return c
