"""Around any optimizer: slow weights that follow the fast ones, and averages of the weights."""

from __future__ import annotations

from typing import Any

import torch

from .base import Optimizer, apply_updates, each
from .checks import check, is_share


def lookahead(optimizer: Optimizer, every: int = 5, alpha: float = 0.5) -> Optimizer:
    """Lookahead (Zhang et al. 2019, https://arxiv.org/abs/1907.08610): every so many steps slow weights move by the share
    `alpha` towards those that `optimizer` trains, which then go on from there.

    The state holds `step`, `slow`, shaped like the parameters, and `optimizer`. Raises ConfigError for a value out of range.
    """
    check("lookahead", every=(every, every >= 1, "at least 1"), alpha=(alpha, 0 < alpha <= 1, "a number in (0, 1]"))

    def init(params: Any) -> dict[str, Any]:
        slow = each(lambda p: p.detach().clone(), params)
        return {"step": torch.zeros((), dtype=torch.int64), "slow": slow, "optimizer": optimizer.init(params)}

    def update(grads: Any, state: dict[str, Any], params: Any, **extra: Any) -> tuple[Any, dict[str, Any]]:
        updates, inner = optimizer.update(grads, state["optimizer"], params, **extra)
        step = state["step"] + 1
        now = step % every == 0
        fast = apply_updates(params, updates)
        slow = each(lambda s, f: torch.where(now, s + (f - s) * alpha, s), state["slow"], fast)
        updates = each(lambda u, s, p: torch.where(now, (s - p).to(u.dtype), u), updates, slow, params)
        return updates, {"step": step, "slow": slow, "optimizer": inner}

    return Optimizer(init, update, lambda params, state: optimizer.evaluate(params, state["optimizer"]))


def ema(optimizer: Optimizer, decay: float = 0.999) -> Optimizer:
    """`optimizer`, and beside the weights it trains their exponential moving average (Polyak & Juditsky 1992), which
    `evaluate` gives. Its `decay` grows as (1 + step) / (10 + step) up to that given, so that the first weights are forgotten
    soon. The state holds `step`, `average`, shaped like the parameters, and `optimizer`. Raises ConfigError for a value
    out of range."""
    check("ema", decay=is_share(decay))

    def init(params: Any) -> dict[str, Any]:
        average = each(lambda p: p.detach().clone(), params)
        return {"step": torch.zeros((), dtype=torch.int64), "average": average, "optimizer": optimizer.init(params)}

    def update(grads: Any, state: dict[str, Any], params: Any, **extra: Any) -> tuple[Any, dict[str, Any]]:
        updates, inner = optimizer.update(grads, state["optimizer"], params, **extra)
        t = state["step"].to(torch.float64) + 1
        share = 1 - ((1 + t) / (10 + t)).clamp(max=decay)
        new = optimizer.evaluate(apply_updates(params, updates), inner)
        average = each(lambda a, p: a + (p - a) * share.to(a.dtype), state["average"], new)
        return updates, {"step": state["step"] + 1, "average": average, "optimizer": inner}

    return Optimizer(init, update, lambda params, state: state["average"])
