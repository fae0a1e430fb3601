"""The transforms users call: `grad`, `value_and_grad`, `vjp`, `jvp`, `hvp`, `stop_gradient`.

They take functions of pytrees of tensors (after JAX's transforms of the same names), run eagerly or under `nf.jit`,
and nest in any order. None of them uses torch.autograd.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any

import torch

from ..errors import DifferentiationError
from ..graph import gradient_mode
from ..graph.source import user_line
from ..graph.tree import TreeSpec, leaves_like, tree_flatten, tree_map, tree_unflatten
from .forward import Forward
from .tape import Tape, differentiable


def value_and_grad(f: Callable, argnums: int | tuple[int, ...] = 0, has_aux: bool = False) -> Callable:
    """A function like `f` that returns `(f(...), gradient)`.

    `f` returns one real scalar tensor (shape []), or `(scalar, aux)` with `has_aux`, when the first result is
    `(scalar, aux)` too. The gradient is a pytree like argument `argnums` (a tuple of them for a tuple of argnums),
    each leaf with its argument's shape and dtype (None for None). An argument that `f` doesn't use has a gradient of zeros.

    Raises DifferentiationError for a result that isn't a real scalar, an argument that isn't floating point or
    complex, and an operator without a derivative rule.
    """

    @wraps(f)
    def value_and_grad_f(*args: Any, **kwargs: Any) -> tuple[Any, Any]:
        chosen, call = select(f, argnums, args, kwargs)
        tape = Tape()
        with gradient_mode.differentiating():
            with tape:
                watched, leaves = _watch(tape, chosen)
                out = tree_map(tape.now, call(*watched))
            loss, aux = out if has_aux else (out, None)
            del out, watched
            _check_scalar(loss)
            grads = tape.pull([loss], [torch.ones_like(loss)], leaves)
            flat = _filled(grads, leaves)
            tape.write_back()
        gradient = pick(tree_unflatten(flat, tree_flatten(chosen)[1]), argnums)
        return ((loss, aux) if has_aux else loss), gradient

    return value_and_grad_f


def grad(f: Callable, argnums: int | tuple[int, ...] = 0, has_aux: bool = False) -> Callable:
    """A function like `f` that returns the gradient only (with `has_aux`: `(gradient, aux)`); see value_and_grad."""
    both = value_and_grad(f, argnums, has_aux)

    @wraps(f)
    def grad_f(*args: Any, **kwargs: Any) -> Any:
        value, gradient = both(*args, **kwargs)
        return (gradient, value[1]) if has_aux else gradient

    return grad_f


def vjp(f: Callable, *primals: Any) -> tuple[Any, Callable]:
    """`(f(*primals), pullback)`. `pullback(cotangent)`, of a pytree like the output, gives a tuple of cotangents, one
    for each primal; it may be called any number of times."""
    tape = Tape()
    with gradient_mode.differentiating():
        with tape:
            watched, leaves = _watch(tape, primals)
            out = tree_map(tape.now, f(*watched))
        if tape.external_writes():
            raise DifferentiationError(
                f"{user_line()}: the function given to nf.vjp writes in place to a tensor from outside, which the "
                f"pullback may still need. Return the new value instead."
            )
    flat_out, out_tree = tree_flatten(out)
    _, in_tree = tree_flatten(primals)

    def pullback(cotangent: Any) -> tuple:
        flat = _like(out_tree, "cotangent", "output", cotangent)
        for g, y in zip(flat, flat_out):
            if isinstance(y, torch.Tensor) and isinstance(g, torch.Tensor) and g.shape != y.shape:
                raise DifferentiationError(
                    f"{user_line()}: a cotangent of shape {tuple(g.shape)} for an output of shape {tuple(y.shape)}; "
                    f"they must be equal."
                )
        with gradient_mode.no_autograd():
            grads = tape.pull(flat_out, flat, leaves, keep=True)
            return tree_unflatten(_filled(grads, leaves), in_tree)

    return out, pullback


def jvp(f: Callable, primals: tuple, tangents: tuple) -> tuple[Any, Any]:
    """`(f(*primals), tangent of the output)` along `tangents`, pytrees like `primals`."""
    for what, given in (("primals", primals), ("tangents", tangents)):
        if not isinstance(given, (tuple, list)):
            raise DifferentiationError(
                f"{user_line()}: {what} are {type(given).__name__}; expected a tuple, with an entry for each argument of the "
                f"function. For a function of one argument write (x,)."
            )
    flat, tree = tree_flatten(tuple(primals))
    moves = _like(tree, "tangents", "primals", tuple(tangents))
    forward = Forward()
    with gradient_mode.differentiating():
        with forward:
            watched = []
            for x, t in zip(flat, moves):
                check_input(x)
                if x is None:
                    watched.append(None)
                    continue
                if not isinstance(t, torch.Tensor):
                    raise DifferentiationError(f"{user_line()}: a tangent that is {t!r} for an input of shape {tuple(x.shape)}.")
                if t.shape != x.shape or t.dtype != x.dtype:
                    raise DifferentiationError(
                        f"{user_line()}: a tangent of shape {tuple(t.shape)} and dtype {t.dtype} for an input of shape "
                        f"{tuple(x.shape)} and dtype {x.dtype}; they must be equal."
                    )
                watched.append(forward.watch(x, t))
            out = tree_map(forward.now, f(*tree_unflatten(watched, tree)))
        forward.write_back()
        return out, tree_map(lambda y: _tangent(forward, y), out)


def _tangent(forward: Forward, y: Any) -> Any:
    t = forward.tangent(y)
    return torch.zeros_like(y) if t is None and isinstance(y, torch.Tensor) else t


def hvp(f: Callable, primals: tuple, tangents: tuple) -> Any:
    """The product of the Hessian of the scalar function `f` at `primals` with `tangents`: forward over reverse, so at
    a small multiple of the gradient's cost and memory (Pearlmutter 1994). A tuple like `primals`."""
    argnums = tuple(range(len(primals) if isinstance(primals, (tuple, list)) else 1))
    return jvp(grad(f, argnums), primals, tangents)[1]


def stop_gradient(tree: Any) -> Any:
    """The same tensors, constant to every derivative."""
    return tree_map(lambda x: x.detach() if isinstance(x, torch.Tensor) else x, tree)


def _like(tree: TreeSpec, what: str, of: str, given: Any) -> list:
    """The leaves of `given` in the order of `tree`, whatever that of a dictionary's keys is."""
    try:
        return leaves_like(tree, given)
    except ValueError as e:
        raise DifferentiationError(f"{user_line()}: the structure of the {what} differs from that of the {of}: {e}") from e


def select(f: Callable, argnums: int | tuple[int, ...], args: tuple, kwargs: dict) -> tuple[list, Callable]:
    """The arguments that `argnums` names, and `f` as a function of them."""
    which = (argnums,) if isinstance(argnums, int) else tuple(argnums)
    if any(not -len(args) <= n < len(args) for n in which):
        raise DifferentiationError(
            f"{user_line()}: argnums={argnums} of a call with {len(args)} positional arguments. Differentiated arguments "
            f"must be passed by position."
        )

    def call(*chosen: Any) -> Any:
        full = list(args)
        for n, x in zip(which, chosen):
            full[n] = x
        return f(*full, **kwargs)

    return [args[n] for n in which], call


def pick(found: Sequence, argnums: int | tuple[int, ...]) -> Any:
    """What was found for the selected arguments, in the form of `argnums`."""
    return found[0] if isinstance(argnums, int) else tuple(found)


def _watch(tape: Tape, args: Any) -> tuple[Any, list[torch.Tensor]]:
    flat, tree = tree_flatten(args)
    for leaf in flat:
        check_input(leaf)
    watched = [None if leaf is None else tape.watch(leaf) for leaf in flat]
    return tree_unflatten(watched, tree), watched


def _filled(grads: list, like: list) -> list:
    """Zeros where no gradient has arrived, None for None."""
    return [torch.zeros_like(x) if g is None and x is not None else g for g, x in zip(grads, like)]


def check_input(x: Any) -> None:
    """Raise for a leaf that can't be differentiated with respect to."""
    if x is None:  # as a leaf of a pytree it is nothing
        return
    if isinstance(x, torch.nn.Module):
        raise DifferentiationError(
            f"{user_line()}: can't differentiate with respect to a module ({type(x).__name__}). Pass its parameters, "
            f"dict(module.named_parameters()), and call torch.func.functional_call(module, parameters, inputs) with them."
        )
    if not differentiable(x):
        what = f"a tensor of {x.dtype}" if isinstance(x, torch.Tensor) else f"{x!r} ({type(x).__name__})"
        raise DifferentiationError(
            f"{user_line()}: can't differentiate with respect to {what}; expected floating-point or complex tensors. "
            f"Leave this argument out of argnums, or convert it with .to(torch.float32)."
        )
    if x.layout != torch.strided:
        raise DifferentiationError(
            f"{user_line()}: can't differentiate with respect to a tensor of layout {x.layout}; expected a dense one. "
            f"Differentiate with respect to its values, or convert it with .to_dense()."
        )


def _check_scalar(loss: Any) -> None:
    if not isinstance(loss, torch.Tensor) or loss.dim() != 0 or loss.is_complex() or not loss.is_floating_point():
        what = f"shape {tuple(loss.shape)}, {loss.dtype}" if isinstance(loss, torch.Tensor) else type(loss).__name__
        raise DifferentiationError(
            f"{user_line()}: the gradient needs a function that returns one real scalar tensor, not {what}. Reduce it, "
            f"with .mean() or .sum(), or use nf.vjp; if it returns (loss, aux), say has_aux=True."
        )
