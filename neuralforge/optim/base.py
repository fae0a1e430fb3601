"""What all optimizers share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from ..graph.tree import tree_flatten, tree_map, tree_unflatten

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


def apply_updates(params: Any, updates: Any) -> Any:
    """`params + updates`, in the dtypes of the parameters."""
    return tree_map(lambda p, u: (p + u).to(p.dtype), params, updates)


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
    return Optimizer(lambda params: (), lambda updates, state, params, **_: (tree_map(lambda u: u * factor, updates), state))


Rule = Callable[..., tuple[torch.Tensor, ...]]
"""`rule(parameter, gradient, *slots) -> (update, *new_slots)`."""


def leaf_by_leaf(slots: dict[str, Callable[[torch.Tensor], torch.Tensor]], at: Callable[[torch.Tensor], Rule]) -> Optimizer:
    """An optimizer that treats every parameter by itself. `slots` names the tensors it keeps for each and makes the first
    ones from the parameter; `at(done)`, given the number of finished updates (int64 scalar), makes the rule of the next.
    The state is `step`, that number, and each slot as a pytree like the parameters."""

    def init(params: Any) -> dict[str, Any]:
        params = tree_map(torch.Tensor.detach, params)
        first = {name: tree_map(make, params) for name, make in slots.items()}
        return {"step": torch.zeros((), dtype=torch.int64), **first}

    def update(grads: Any, state: dict[str, Any], params: Any, **_: Any) -> tuple[Any, dict[str, Any]]:
        rule = at(state["step"])
        flat, tree = tree_flatten(params)
        kept = (tree_flatten(state[name])[0] for name in slots)
        results = [rule(*leaves) for leaves in zip(flat, tree_flatten(grads)[0], *kept, strict=True)]
        columns = [tree_unflatten(list(column), tree) for column in zip(*results)] or [params] * (1 + len(slots))
        return columns[0], {"step": state["step"] + 1, **dict(zip(slots, columns[1:]))}

    return Optimizer(init, update)


def zeros(p: torch.Tensor) -> torch.Tensor:
    return torch.zeros_like(p)


def learning_rate(lr: float | Schedule, step: torch.Tensor) -> torch.Tensor | float:
    return lr(step) if callable(lr) else lr
