"""AdamW (Loshchilov & Hutter 2019, https://arxiv.org/abs/1711.05101), with torch.optim.AdamW's arithmetic."""

from __future__ import annotations

from collections.abc import Callable

import torch

from .base import Optimizer, Rule, Schedule, leaf_by_leaf, learning_rate, zeros
from .checks import are_shares, check, is_at_least_0, is_rate


def adamw(
    lr: float | Schedule,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.01,
    decay: Callable[[torch.Tensor], bool] | None = None,
) -> Optimizer:
    """Adam with decoupled weight decay.

    `lr` is a number or a schedule; `decay(parameter)` says which parameters decay (default: all; pass
    `lambda p: p.dim() >= 2` for matrices only). The state holds `step` (int64 scalar) and the moments `m` and `v`,
    shaped like the parameters. Raises ConfigError for a value out of range.
    """
    check("adamw", lr=is_rate(lr), betas=are_shares(betas), eps=is_at_least_0(eps), weight_decay=is_at_least_0(weight_decay))
    beta1, beta2 = betas

    def at(done: torch.Tensor) -> Rule:
        rate = learning_rate(lr, done)
        # Bias corrections in float64 scalars: beta2 ** step loses digits in float32.
        t = done.to(torch.float64) + 1
        step_size, root = rate / (1 - beta1**t), (1 - beta2**t).sqrt()

        def rule(p: torch.Tensor, g: torch.Tensor, m: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, ...]:
            m = m + (g - m) * (1 - beta1)
            v = v * beta2 + g * g * (1 - beta2)
            u = -step_size.to(p.dtype) * (m / (v.sqrt() / root.to(p.dtype) + eps))
            if weight_decay and (decay is None or decay(p)):
                u = u - p * (rate * weight_decay)
            return u, m, v

        return rule

    return leaf_by_leaf({"m": zeros, "v": zeros}, at)
