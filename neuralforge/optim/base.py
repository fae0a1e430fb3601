"""What all optimizers share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from ..errors import NeuralForgeError
from ..graph.tree import TreeSpec, leaves_like, tree_flatten, tree_map, tree_unflatten

Schedule = Callable[[torch.Tensor], torch.Tensor]
"""Learning rate by step: a function of the number of finished updates (an int64 scalar tensor)."""


class Optimizer(NamedTuple):
    """`init(params) -> state` and `update(grads, state, params, **extra) -> (updates, new_state)`, on equal pytrees of
    tensors; `apply_updates(params, updates)` makes the step. Both are pure; the state is a pytree of tensors. An
    optimizer ignores those of the `extra` arguments that it doesn't know.

    `evaluate(params, state)` gives the weights to validate, to save for use and to generate with, where they aren't those that
    are trained (Schedule-Free, averages)."""

    init: Callable[[Any], Any]
    update: Callable[..., tuple[Any, Any]]
    evaluate: Callable[[Any, Any], Any] = lambda params, state: params


def each(f: Callable, params: Any, *more: Any) -> Any:
    """`f` of each tensor of a pytree like the parameters, and of its counterparts in others; None where there is no parameter."""
    return tree_map(lambda p, *rest: None if p is None else f(p, *rest), params, *more)


def apply_updates(params: Any, updates: Any) -> Any:
    """`params + updates`, in the dtypes of the parameters."""
    return each(lambda p, u: (p + u).to(p.dtype), params, updates)


def like_parameters(tree: TreeSpec, what: str, given: Any) -> list[torch.Tensor]:
    """The leaves of `given` in the order of the parameters, whose structure is `tree`: a dictionary that comes from a file, say, has its
    keys in another order. Raises NeuralForgeError where it isn't like them."""
    try:
        return leaves_like(tree, given)
    except ValueError as e:
        raise NeuralForgeError(f"an optimizer's {what} must be like its parameters, and are not: {e}") from e


def chain(*optimizers: Optimizer) -> Optimizer:
    """One after another: each takes the updates of the one before as its gradients. The state is a tuple of theirs."""

    def init(params: Any) -> tuple:
        return tuple(optimizer.init(params) for optimizer in optimizers)

    def update(grads: Any, state: tuple, params: Any, **extra: Any) -> tuple[Any, tuple]:
        new = []
        for optimizer, before in zip(optimizers, state, strict=True):
            grads, after = optimizer.update(grads, before, params, **extra)
            new.append(after)
        return grads, tuple(new)

    def evaluate(params: Any, state: tuple) -> Any:
        for optimizer, own in zip(optimizers, state, strict=True):
            params = optimizer.evaluate(params, own)
        return params

    return Optimizer(init, update, evaluate)


def scale(factor: float) -> Optimizer:
    """Updates times `factor`, as the last link of a chain: a learning rate of its own for some parameters."""
    return Optimizer(lambda params: (), lambda updates, state, params, **_: (each(lambda u: u * factor, updates), state))


Rule = Callable[..., tuple[torch.Tensor, ...]]
"""`rule(parameter, gradient, *slots) -> (update, *new_slots)`."""


def leaf_by_leaf(slots: dict[str, Callable[[torch.Tensor], torch.Tensor]], at: Callable[[torch.Tensor], Rule]) -> Optimizer:
    """An optimizer that treats every parameter by itself. `slots` names the tensors it keeps for each and makes the first
    ones from the parameter; `at(done)`, given the number of finished updates (int64 scalar), makes the rule of the next.
    The state is `step`, that number, and each slot as a pytree like the parameters. A complex number counts as two real ones, as in
    torch.optim."""

    def init(params: Any) -> dict[str, Any]:
        first = {name: each(lambda p: make(p.detach()), params) for name, make in slots.items()}  # noqa: B023
        return {"step": torch.zeros((), dtype=torch.int64), **first}

    def update(grads: Any, state: dict[str, Any], params: Any, **_: Any) -> tuple[Any, dict[str, Any]]:
        rule = at(state["step"])
        flat, tree = tree_flatten(params)
        columns = [flat, like_parameters(tree, "gradients", grads), *(like_parameters(tree, name, state[name]) for name in slots)]
        nothing = (None,) * (1 + len(slots))  # where there is no parameter
        results = [nothing if p is None else _of_real_numbers(rule, p, *rest) for p, *rest in zip(*columns)]
        columns = [tree_unflatten(list(column), tree) for column in zip(*results)] or [params] * (1 + len(slots))
        return columns[0], {"step": state["step"] + 1, **dict(zip(slots, columns[1:]))}

    return Optimizer(init, update)


def _of_real_numbers(rule: Rule, p: torch.Tensor, g: torch.Tensor, *slots: torch.Tensor) -> tuple[torch.Tensor, ...]:
    if not p.is_complex():
        return rule(p, g, *slots)
    real = [torch.view_as_real(x.resolve_conj()) if x.is_complex() else x for x in (p, g, *slots)]
    made = zip((p, *slots), rule(*real), strict=True)
    return tuple(torch.view_as_complex(y.contiguous()) if x.is_complex() else y for x, y in made)


def absolute_squares(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """|x|^2 of each element, in the real `dtype`."""
    if not x.is_complex():
        return x.to(dtype).square()
    return torch.view_as_real(x.resolve_conj()).to(dtype).square().sum(-1)


def norm_dtype(leaves: list) -> torch.dtype:
    """What norms of these tensors, or None, are computed in: float64 if one has numbers of 64 bits, else float32."""
    wide = (torch.float64, torch.complex128)
    return torch.float64 if any(x is not None and x.dtype in wide for x in leaves) else torch.float32


def zeros(p: torch.Tensor) -> torch.Tensor:
    return torch.zeros_like(p)


def learning_rate(lr: float | Schedule, step: torch.Tensor) -> torch.Tensor | float:
    return lr(step) if callable(lr) else lr
