"""Eigenvalues and singular values.

Cotangents of vectors that are defined only up to a phase (eigenvectors, singular vectors) make sense for functions
that don't depend on the phase. Where eigenvalues coincide the derivative of their vectors doesn't exist, and is
infinite here as in PyTorch.
"""

from __future__ import annotations

import torch

from .factorizations import as_diagonal, diagonal
from .table import Derivative, adjoint, aten, conj, plus, rule


def _row(x):
    return x.unsqueeze(-2)


@rule("_linalg_eigh")
def eigh(out, a, uplo="L", compute_v=True):
    vectors = lambda: out if compute_v else aten._linalg_eigh(a, uplo, True)

    def vjp(gs):
        w, v = vectors()
        inner = None if gs[1] is None else (adjoint(v) @ gs[1]) / _gaps(w)
        inner = plus(None if inner is None else _hollow(inner), None if gs[0] is None else as_diagonal(gs[0], v))
        return v @ inner @ adjoint(v)

    def jvp(t):
        w, v = vectors()
        inner = adjoint(v) @ t @ v
        return torch.real(diagonal(inner)), v @ _hollow(inner / _gaps(w)) if compute_v else None

    return Derivative(vjp, jvp)


def _gaps(w):
    """w_j - w_i, with ones on the diagonal."""
    return _row(w) - w.unsqueeze(-1) + torch.diag_embed(torch.ones_like(w))


def _hollow(x):
    return x - torch.diag_embed(diagonal(x))


@rule("linalg_eig")
def eig(out, a):
    return _eig_derivative(a, lambda: out)


@rule("linalg_eigvals", "_linalg_eigvals")
def eigvals(w, a):
    both = _eig_derivative(a, lambda: aten.linalg_eig(a))
    return Derivative(lambda g: both.vjp((g, None)), lambda t: both.jvp(t)[0])


def _eig_derivative(a, values):
    def vjp(gs):
        w, v = values()
        inner = None
        if gs[1] is not None:
            turned = adjoint(v) @ gs[1]
            # The vectors have unit length: their cotangent along themselves is lost.
            turned = turned - adjoint(v) @ v * _row(torch.real(diagonal(turned)))
            inner = _hollow(turned / conj(_gaps(w)))
        inner = plus(inner, None if gs[0] is None else torch.diag_embed(gs[0]))
        return torch.linalg.solve(adjoint(v), inner @ adjoint(v))

    def jvp(t):
        w, v = values()
        inner = torch.linalg.solve(v, t.to(v.dtype) @ v)
        tv = v @ _hollow(inner / _gaps(w))
        return diagonal(inner), tv - v * _row(torch.real(diagonal(adjoint(v) @ tv)))

    return Derivative(vjp, jvp)


@rule("_linalg_svd")
def svd(out, a, full_matrices=False, compute_uv=True, *, driver=None):
    m, n = a.shape[-2:]
    k = min(m, n)

    def factors():
        u, s, vh = out if compute_uv else aten._linalg_svd(a, False, True, driver=driver)
        return u[..., :, :k], s, vh[..., :k, :]

    # The vectors that complete a full basis move so as to stay orthogonal to the others, and not among themselves:
    # right for every function that doesn't depend on how they were chosen.
    def without_rest(gu, gvh, u, vh):
        if gu is not None and gu.shape[-1] > k:
            gu = gu[..., :k] - out[0][..., k:] @ adjoint(gu[..., k:]) @ u
        if gvh is not None and gvh.shape[-2] > k:
            gvh = gvh[..., :k, :] - vh @ adjoint(gvh[..., k:, :]) @ out[2][..., k:, :]
        return gu, gvh

    def with_rest(tu, tvh, u, vh):
        if out[0].shape[-1] > k:
            tu = torch.cat([tu, -u @ (adjoint(tu) @ out[0][..., k:])], -1)
        if out[2].shape[-2] > k:
            tvh = torch.cat([tvh, -(out[2][..., k:, :] @ adjoint(tvh)) @ vh], -2)
        return tu, tvh

    def gaps(s):
        return (_row(s) - s.unsqueeze(-1)) * (_row(s) + s.unsqueeze(-1)) + torch.diag_embed(torch.ones_like(s))

    def vjp(gs):
        u, s, vh = factors()
        g = gs[1]
        gu, gvh = without_rest(gs[0], gs[2], u, vh)
        inner = None if g is None else as_diagonal(g, a)
        if gu is None and gvh is None:
            return u @ inner @ vh
        uu = None if gu is None else adjoint(u) @ gu
        vv = None if gvh is None else vh @ adjoint(gvh)
        skew = lambda x: x - adjoint(x)
        inner = plus(
            inner,
            None if uu is None else _hollow(skew(uu) / gaps(s)) * _row(s),
            None if vv is None else s.unsqueeze(-1) * _hollow(skew(vv) / gaps(s)),
        )
        if a.is_complex() and uu is not None:
            inner = inner + as_diagonal(torch.imag(diagonal(uu)) / s, a) * 1j
        total = u @ inner @ vh
        if m > k and gu is not None:
            rest = gu / _row(s)
            total = total + (rest - u @ (adjoint(u) @ rest)) @ vh
        if n > k and gvh is not None:
            rest = gvh / s.unsqueeze(-1)
            total = total + u @ (rest - (rest @ adjoint(vh)) @ vh)
        return total

    def jvp(t):
        if k == 0:
            return tuple(torch.zeros_like(r) for r in out)
        u, s, vh = factors()
        inner = adjoint(u) @ t @ adjoint(vh)
        ts = torch.real(diagonal(inner))
        if not compute_uv:
            return None, ts, None
        sym = lambda x: x + adjoint(x)
        ku = _hollow(sym(inner * _row(s)) / gaps(s))
        kv = _hollow(sym(s.unsqueeze(-1) * inner) / gaps(s))
        if a.is_complex():
            ku = ku + as_diagonal(torch.imag(diagonal(inner)) / s, a) * 1j
        tu, tvh = u @ ku, adjoint(kv) @ vh
        if m > k:
            rest = t @ adjoint(vh) / _row(s)
            tu = tu + rest - u @ (adjoint(u) @ rest)
        if n > k:
            rest = adjoint(u) @ t / s.unsqueeze(-1)
            tvh = tvh + rest - rest @ adjoint(vh) @ vh
        tu, tvh = with_rest(tu, tvh, u, vh)
        return tu, ts, tvh

    return Derivative(vjp, jvp)
