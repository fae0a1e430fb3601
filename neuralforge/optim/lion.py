"""Lion (Chen et al. 2023, https://arxiv.org/abs/2302.06675)."""

from __future__ import annotations

from collections.abc import Callable

import torch

from .base import Optimizer, Rule, Schedule, leaf_by_leaf, learning_rate, zeros
from .checks import are_shares, check, is_at_least_0, is_rate


def lion(
    lr: float | Schedule,
    betas: tuple[float, float] = (0.9, 0.99),
    weight_decay: float = 0.0,
    decay: Callable[[torch.Tensor], bool] | None = None,
) -> Optimizer:
    """The sign of an interpolation between momentum and gradient, with decoupled weight decay. Every element moves by
    `lr`, so that wants to be 3 to 10 times smaller than AdamW's, and `weight_decay` as many times larger.

    `decay(parameter)` says which parameters decay (default: all). The state holds `step` and `m`, shaped like the parameters.
    Raises ConfigError for a value out of range.
    """
    check("lion", lr=is_rate(lr), betas=are_shares(betas), weight_decay=is_at_least_0(weight_decay))
    beta1, beta2 = betas

    def at(done: torch.Tensor) -> Rule:
        rate = learning_rate(lr, done)

        def rule(p: torch.Tensor, g: torch.Tensor, m: torch.Tensor) -> tuple[torch.Tensor, ...]:
            u = (m * beta1 + g * (1 - beta1)).sign()
            if weight_decay and (decay is None or decay(p)):
                u = u + p * weight_decay
            return u * -rate, m * beta2 + g * (1 - beta2)

        return rule

    return leaf_by_leaf({"m": zeros}, at)
