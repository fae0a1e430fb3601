"""Whole derivative matrices, and derivatives as linear functions."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch

from ..errors import DifferentiationError
from ..graph.source import user_line
from ..graph.tree import tree_flatten, tree_map, tree_unflatten
from .tape import differentiable
from .transforms import check_input, jvp, pick, select, vjp
from .vmap import vmap


def jacrev(f: Callable, argnums: int | tuple[int, ...] = 0) -> Callable:
    """The Jacobian by reverse mode, a pullback for each output element (vectorised): right for few outputs and many
    inputs (Griewank & Walther 2008, chapter 3). The result has the output's structure, with the argument's structure
    (a tuple of them for a tuple of argnums) at each leaf; a leaf has shape [*output shape, *input shape]. Arguments
    and results are real."""

    @wraps(f)
    def jacobian(*args: Any, **kwargs: Any) -> Any:
        chosen, call = _select(f, argnums, args, kwargs)
        out, pullback = vjp(call, *chosen)
        outputs, out_tree = tree_flatten(out)
        zeros = [torch.zeros_like(y) for y in outputs]
        rows = []
        for i, y in enumerate(outputs):
            _check_output(y)
            _check_real(y, "a result")

            def pull(e: torch.Tensor, i: int = i) -> Any:
                return pullback(tree_unflatten([*zeros[:i], e, *zeros[i + 1 :]], out_tree))

            flat = vmap(pull)(_basis(y))
            shaped = lambda g, y=y: None if g is None else g.reshape((*y.shape, *g.shape[1:]))
            rows.append(tree_map(shaped, pick(flat, argnums)))
        return tree_unflatten(rows, out_tree)

    return jacobian


def jacfwd(f: Callable, argnums: int | tuple[int, ...] = 0) -> Callable:
    """The Jacobian by forward mode, a tangent for each input element (vectorised): right for few inputs and many
    outputs. Structured as jacrev's. Arguments are real."""

    @wraps(f)
    def jacobian(*args: Any, **kwargs: Any) -> Any:
        chosen, call = _select(f, argnums, args, kwargs)
        inputs, in_tree = tree_flatten(tuple(chosen))
        zeros = [None if x is None else torch.zeros_like(x) for x in inputs]
        columns = []  # for each input leaf, the outputs' derivatives, input elements first
        for i, x in enumerate(inputs):
            if x is None:
                continue

            def push(e: torch.Tensor, i: int = i) -> Any:
                return jvp(call, tuple(chosen), tree_unflatten([*zeros[:i], e, *zeros[i + 1 :]], in_tree))[1]

            columns.append(tree_flatten(vmap(push, out_axes=-1)(_basis(x))))
        out_tree = columns[0][1]
        rows = []
        for j in range(out_tree.num_leaves):
            column = iter(columns)
            leaves = []
            for x in inputs:
                d = None if x is None else next(column)[0][j]
                leaves.append(None if x is None else d.reshape((*d.shape[:-1], *x.shape)))
            rows.append(pick(tree_unflatten(leaves, in_tree), argnums))
        return tree_unflatten(rows, out_tree)

    return jacobian


def hessian(f: Callable, argnums: int | tuple[int, ...] = 0) -> Callable:
    """Second derivatives, forward over reverse: for a scalar function of x, [*x.shape, *x.shape]; structured as the
    Jacobian of the Jacobian."""
    return jacfwd(jacrev(f, argnums), argnums)


def linearize(f: Callable, *primals: Any) -> tuple[Any, Callable]:
    """`(f(*primals), jvp_fn)`: `jvp_fn(*tangents)` is the derivative along the tangents as a linear function, which
    reuses what `f` computed. (The pullback is linear in its cotangent; its own pullback is the derivative: see "A new
    trick for calculating Jacobian vector products", Townsend 2017.) `f` returns floating-point or complex tensors."""
    out, pullback = vjp(f, *primals)
    for y in tree_flatten(out)[0]:
        _check_output(y)
    zeros = tree_map(lambda y: torch.zeros_like(y), out)
    _, push = vjp(lambda cotangent: pullback(cotangent), zeros)
    return out, lambda *tangents: push(tangents)[0]


def _select(f: Callable, argnums: int | tuple[int, ...], args: tuple, kwargs: dict) -> tuple[list, Callable]:
    chosen, call = select(f, argnums, args, kwargs)
    for x in tree_flatten(chosen)[0]:
        check_input(x)
        _check_real(x, "an argument")
    return chosen, call


def _basis(x: torch.Tensor) -> torch.Tensor:
    """The unit tensors of x's shape, stacked: [numel, *x.shape]."""
    return torch.eye(x.numel(), dtype=x.dtype, device=x.device).reshape(x.numel(), *x.shape)


def _check_real(x: Any, what: str) -> None:
    if isinstance(x, torch.Tensor) and x.is_complex():
        raise DifferentiationError(
            f"{user_line()}: the Jacobian of {what} of {x.dtype}: a matrix of complex numbers is no derivative unless the "
            f"function is holomorphic. Differentiate through torch.view_as_real and torch.view_as_complex."
        )


def _check_output(y: Any) -> None:
    if not differentiable(y):
        what = f"a tensor of {y.dtype}" if isinstance(y, torch.Tensor) else type(y).__name__
        raise DifferentiationError(
            f"{user_line()}: expected a function that returns floating-point or complex tensors, not {what}."
        )
