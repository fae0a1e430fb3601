"""Checking derivatives, those of users' own rules included."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from .autograd import jvp, vjp
from .graph.tree import tree_flatten, tree_map, tree_unflatten


def check_grads(
    f: Callable,
    args: Sequence[Any],
    order: int = 2,
    modes: Sequence[str] = ("fwd", "rev"),
    eps: float = 1e-6,
    tolerance: float = 1e-5,
    seed: int = 0,
) -> None:
    """Compare the derivatives of `f` at `args` with central differences, in random directions, up to `order`.

    The floating-point and complex tensors in `args`, pytrees, vary; they are float64 or complex128. Other leaves, of
    `args` and of the result, stay as they are. "fwd" checks jvp against the differences; "rev" checks that
    vjp is its adjoint; for each further order, the derivative in that mode is checked as a function in its turn (the
    recursion of HIPS autograd's test_util). Raises AssertionError with the numbers.
    """
    generator = torch.Generator().manual_seed(seed)
    for mode in modes:
        if mode not in ("fwd", "rev"):
            raise AssertionError(f"check_grads: mode {mode!r}; expected fwd or rev.")
    leaves, tree = tree_flatten(tuple(args))
    at = [i for i, x in enumerate(leaves) if _smooth(x)]
    for i in at:
        if leaves[i].dtype not in (torch.float64, torch.complex128):
            raise AssertionError(
                f"check_grads: an argument of {leaves[i].dtype}; finite differences need float64 or complex128."
            )

    def g(*moving: torch.Tensor) -> list[torch.Tensor]:
        full = list(leaves)
        for i, x in zip(at, moving):
            full[i] = x
        return [y for y in tree_flatten(f(*tree_unflatten(full, tree)))[0] if _smooth(y)]

    _check(g, tuple(leaves[i] for i in at), order, modes, eps, tolerance, generator, "f")


def _smooth(x: Any) -> bool:
    return isinstance(x, torch.Tensor) and (x.is_floating_point() or x.is_complex())


def _check(f: Callable, args: tuple, order: int, modes: Sequence[str], eps: float, tolerance: float, generator, name: str) -> None:
    if order == 0:
        return
    direction = _random_like(args, generator)
    shifted = lambda s: tree_map(lambda x, d: x + s * d, args, direction)
    high, low = f(*shifted(eps)), f(*shifted(-eps))
    numeric = tree_map(lambda a, b: (a - b) / (2 * eps), high, low)
    weights = _random_like(numeric, generator)
    expected = _inner(weights, numeric)
    scale = 1 + sum(float((w * n).abs().sum()) for w, n in zip(tree_flatten(weights)[0], tree_flatten(numeric)[0]))
    for mode in modes:
        if mode == "fwd":
            found = _inner(weights, jvp(f, args, direction)[1])
            follow = lambda *xs: jvp(f, xs, direction)[1]
        else:
            found = _inner(vjp(f, *args)[1](weights), direction)
            follow = lambda *xs: vjp(f, *xs)[1](weights)
        if not abs(found - expected) <= tolerance * scale:  # true of NaN too
            raise AssertionError(
                f"{mode} derivative of {name}: {found:.10g}, and central differences give {expected:.10g} (a relative "
                f"difference of {abs(found - expected) / scale:.2g}, tolerance {tolerance:.2g})."
            )
        _check(follow, args, order - 1, modes, eps, tolerance, generator, f"{mode} of {name}")


def _random_like(tree: Any, generator: torch.Generator) -> Any:
    leaves, spec = tree_flatten(tree)
    draw = lambda x: torch.randn(x.shape, dtype=x.dtype, generator=generator)
    return tree_unflatten([draw(x) for x in leaves], spec)


def _inner(a: Any, b: Any) -> float:
    """The real inner product of two pytrees."""
    return float(sum(torch.real(x.conj() * y).sum() for x, y in zip(tree_flatten(a)[0], tree_flatten(b)[0])))
