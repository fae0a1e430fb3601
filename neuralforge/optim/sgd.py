"""Stochastic gradient descent, with torch.optim.SGD's arithmetic."""

from __future__ import annotations

from collections.abc import Callable

import torch

from .base import Optimizer, Rule, Schedule, leaf_by_leaf, learning_rate, zeros
from .checks import check, is_at_least_0, is_rate, is_share


def sgd(
    lr: float | Schedule,
    momentum: float = 0.0,
    dampening: float = 0.0,
    weight_decay: float = 0.0,
    nesterov: bool = False,
    decay: Callable[[torch.Tensor], bool] | None = None,
) -> Optimizer:
    """Gradient descent, with momentum (Polyak 1964) or Nesterov's (Sutskever et al. 2013,
    https://proceedings.mlr.press/v28/sutskever13.html). `weight_decay` is coupled: it is added to the gradient.
    `decay(parameter)` says which parameters decay (default: all).

    The state holds `step` and, with momentum, `m`, shaped like the parameters. Raises ConfigError for a value out of range.
    """
    check(
        "sgd",
        lr=is_rate(lr),
        momentum=is_share(momentum),
        dampening=is_share(dampening),
        weight_decay=is_at_least_0(weight_decay),
        nesterov=(nesterov, not nesterov or momentum > 0 and not dampening, "False without momentum or with dampening"),
    )

    def at(done: torch.Tensor) -> Rule:
        rate, first = learning_rate(lr, done), done == 0

        def rule(p: torch.Tensor, g: torch.Tensor, *m: torch.Tensor) -> tuple[torch.Tensor, ...]:
            if weight_decay and (decay is None or decay(p)):
                g = g + p * weight_decay
            if not m:
                return (g * -rate,)
            new = m[0] * momentum + g * (1 - dampening)
            if dampening:  # the first gradient is taken whole
                new = torch.where(first, g, new)
            return (g + new * momentum if nesterov else new) * -rate, new

        return rule

    return leaf_by_leaf({"m": zeros} if momentum else {}, at)
