"""Matrix products, solves and inverses, determinants, matrix functions."""

from __future__ import annotations

import torch

from ...errors import DifferentiationError
from ...kernels import matmul
from .table import Derivative, adjoint, aten, conj, definition, linear, rule

# ---- products


@rule("mm", "bmm")
def mm(y, a, b):
    return linear(lambda g: g @ adjoint(b)), linear(lambda g: adjoint(a) @ g)


definition("neuralforge::matmul")(matmul.reference)


@rule("_grouped_mm")
def grouped_mm(y, a, b, offs=None, bias=None, out_dtype=None):
    """Experts' products: groups of rows times a matrix each. Its derivatives are products of groups too, of rows and of terms."""
    times = lambda a, b: aten._grouped_mm(a, b, offs)
    return linear(lambda g: times(g.contiguous(), b.mT)), linear(lambda g: times(a.mT, g.contiguous()))


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
        Derivative(lambda g: _times(g, conj(beta)), lambda t: _times(t, beta)),
        Derivative(lambda g: _times(g @ adjoint(b), conj(alpha)), lambda t: _times(t @ b, alpha)),
        Derivative(lambda g: _times(adjoint(a) @ g, conj(alpha)), lambda t: _times(a @ t, alpha)),
    )


def _times(x, factor):
    return x if factor == 1 else x * factor


@definition("addbmm")
def addbmm(c, a, b, *, beta=1, alpha=1):
    product = _times((a @ b).sum(0), alpha)
    return product.expand(c.shape) if beta == 0 else _times(c, beta) + product


@definition("_trilinear")
def trilinear(a, b, c, expand1, expand2, expand3, sum_dim, unroll_dim=1):
    product = 1
    for x, dims in ((a, expand1), (b, expand2), (c, expand3)):
        for d in dims:
            x = x.unsqueeze(d)
        product = product * x
    return product.sum(sum_dim) if sum_dim else product


def _first(gs, count=1):
    """The cotangents of the public results; the others are a factorization's workings."""
    if any(g is not None for g in gs[count:]):
        raise DifferentiationError(
            "the LU factors that linalg.solve and linalg.det return beside their result have no derivative there. Take "
            "them from torch.linalg.lu or torch.linalg.lu_factor."
        )
    return gs[0] if count == 1 else gs[:count]


# ---- solves and inverses


@rule("linalg_inv_ex")
def inv_ex(out, a, *, check_errors=False):
    y = out[0]
    return Derivative(lambda gs: -(adjoint(y) @ gs[0] @ adjoint(y)), lambda t: (-(y @ t @ y), None))


@rule("_linalg_solve_ex")
def solve_ex(out, a, b, *, left=True, check_errors=False):
    x = out[0]
    vector = b.dim() == 1 or (b.dim() == a.dim() - 1 and b.shape == a.shape[:-1])
    matrix = lambda z: z.unsqueeze(-1) if vector else z
    solve = lambda a, b: torch.linalg.solve(a, b, left=left)

    def pull_a(gs):
        gb = matrix(solve(adjoint(a), _first(gs)))
        return -(gb @ adjoint(matrix(x))) if left else -(adjoint(x) @ gb)

    def push_a(t):
        moved = (t @ matrix(x)) if left else x @ t
        return -solve(a, moved.squeeze(-1) if vector else moved), None, None, None

    return (
        Derivative(pull_a, push_a),
        Derivative(lambda gs: solve(adjoint(a), _first(gs)), lambda t: (solve(a, t), None, None, None)),
    )


@rule("linalg_solve_triangular")
def solve_triangular(x, a, b, *, upper, left=True, unitriangular=False):
    solve = lambda b, h: torch.linalg.solve_triangular(
        adjoint(a) if h else a, b, upper=upper != h, left=left, unitriangular=unitriangular
    )
    skip = int(unitriangular)
    part = lambda t: t.triu(skip) if upper else t.tril(-skip)

    def pull_a(g):
        gb = solve(g, True)
        return -part(gb @ adjoint(x) if left else adjoint(x) @ gb)

    return (
        Derivative(pull_a, lambda t: -solve(part(t) @ x if left else x @ part(t), False)),
        Derivative(lambda g: solve(g, True), lambda t: solve(t, False)),
    )


@definition("triangular_solve")
def triangular_solve(b, a, upper=True, transpose=False, unitriangular=False):
    m = a.transpose(-2, -1) if transpose else a
    x = torch.linalg.solve_triangular(m, b, upper=upper != transpose, unitriangular=unitriangular)
    return x, a.clone()


@rule("linalg_pinv.atol_rtol_tensor")
def pinv(y, a, *, atol=None, rtol=None, hermitian=False):
    outside = lambda p: torch.eye(p.shape[-1], dtype=p.dtype, device=p.device) - p

    def vjp(g):
        gh = adjoint(g)
        total = outside(a @ y) @ gh @ (y @ adjoint(y)) + (adjoint(y) @ y) @ gh @ outside(y @ a)
        return total - adjoint(y) @ g @ adjoint(y)

    def jvp(t):
        th = adjoint(t)
        total = (y @ adjoint(y)) @ th @ outside(a @ y) + outside(y @ a) @ th @ (adjoint(y) @ y)
        return total - y @ t @ y

    return Derivative(vjp, jvp)


@definition("linalg_lstsq")
def lstsq(a, b, rcond=None, *, driver=None):
    out = aten.linalg_lstsq(a.detach(), b.detach(), rcond, driver=driver)
    vector = b.dim() == a.dim() - 1
    b = b.unsqueeze(-1) if vector else b
    x = torch.linalg.pinv(a) @ b
    error = a @ x - b
    residuals = torch.real(error * conj(error)).sum(-2) if out[1].numel() else out[1]
    return x.squeeze(-1) if vector else x, residuals, out[2], out[3]


# ---- determinants


@rule("_linalg_det")
def det(out, a):
    y = out[0]

    def cofactors():  # det(A) A^-1; of a singular matrix as a limit
        size = a.abs().sum((-2, -1), keepdim=True)
        nudge = torch.where(size == 0, 1, size) * torch.finfo(a.dtype).eps ** 0.5 * torch.eye(a.shape[-1], dtype=a.dtype, device=a.device)
        near = torch.where((y == 0)[..., None, None], a + nudge, a)
        return torch.linalg.det(near)[..., None, None] * torch.linalg.inv(near)

    return Derivative(
        lambda gs: _first(gs)[..., None, None] * adjoint(cofactors()),
        lambda t: (_trace(cofactors() @ t), None, None),
    )


@rule("_linalg_slogdet")
def slogdet(out, a):
    sign = out[0]

    def vjp(gs):
        g_sign, g = _first(gs, 2)
        if a.is_complex() and g_sign is not None:
            turn = torch.imag(conj(g_sign) * sign) * -1j
            g = turn if g is None else g + turn
        if g is None:
            return None
        return g[..., None, None] * adjoint(torch.linalg.inv(a))

    def jvp(t):
        moved = _trace(torch.linalg.solve(a, t))
        return torch.imag(moved) * 1j * sign if a.is_complex() else None, torch.real(moved), None, None

    return Derivative(vjp, jvp)


def _trace(x):
    return x.diagonal(0, -2, -1).sum(-1)


# ---- functions of matrices


@rule("linalg_matrix_exp")
def matrix_exp(y, a):
    # The derivative at A along E is the corner of exp([[A, E], [0, A]]) (Mathias 1996).
    def corner(a, e):
        n = a.shape[-1]
        top, bottom = torch.cat([a, e], -1), torch.cat([torch.zeros_like(a), a], -1)
        return torch.linalg.matrix_exp(torch.cat([top, bottom], -2))[..., :n, n:]

    return Derivative(lambda g: corner(adjoint(a), g), lambda t: corner(a, t))
