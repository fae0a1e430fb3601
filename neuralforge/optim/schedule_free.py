"""Schedule-Free AdamW (Defazio et al. 2024, https://arxiv.org/abs/2405.15682), with the authors' package's arithmetic."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from .base import Optimizer, Rule, Schedule, each, leaf_by_leaf, learning_rate, zeros
from .checks import are_shares, check, is_at_least_0, is_rate


def schedule_free_adamw(
    lr: float | Schedule,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    decay: Callable[[torch.Tensor], bool] | None = None,
    r: float = 0.0,
    lr_power: float = 2.0,
) -> Optimizer:
    """AdamW that averages its weights in place of lowering the rate, so that training may stop at any step. `lr` is constant
    but for a warm-up.

    The parameters are the points y where gradients are taken; the average x, which is the result, comes from
    `evaluate(params, state)`. The average weighs step t by `t ** r * (largest rate so far) ** lr_power`.
    `decay(parameter)` says which parameters decay (default: all). The state holds `step`, `z` and `v`, shaped like the
    parameters, and `weights` and `largest`, scalars. Raises ConfigError for a value out of range.
    """
    check(
        "schedule_free_adamw",
        lr=is_rate(lr),
        betas=(*are_shares(betas)[:1], are_shares(betas)[1] and betas[0] > 0, "two numbers in (0, 1)"),
        eps=is_at_least_0(eps),
        weight_decay=is_at_least_0(weight_decay),
    )
    beta1, beta2 = betas

    def at(done: torch.Tensor, rate: torch.Tensor, share: torch.Tensor) -> Rule:
        root = (1 - beta2 ** (done.to(torch.float64) + 1)).sqrt()

        def rule(y: torch.Tensor, g: torch.Tensor, z: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, ...]:
            v = v * beta2 + g * g * (1 - beta2)
            u = g / (v.sqrt() / root.to(y.dtype) + eps)
            if weight_decay and (decay is None or decay(y)):
                u = u + y * weight_decay
            step = rate * (beta1 * (1 - share) - 1)
            return (z - y) * share.to(y.dtype) + u * step.to(y.dtype), z - u * rate.to(y.dtype), v

        return rule

    slots = {"z": lambda p: p.clone(), "v": zeros}

    def init(params: Any) -> dict[str, Any]:
        scalar = lambda: torch.zeros((), dtype=torch.float64)
        return {**leaf_by_leaf(slots, lambda done: None).init(params), "weights": scalar(), "largest": scalar()}

    def update(grads: Any, state: dict[str, Any], params: Any, **_: Any) -> tuple[Any, dict[str, Any]]:
        rate = torch.as_tensor(learning_rate(lr, state["step"]), dtype=torch.float64)
        largest = torch.maximum(state["largest"], rate)
        weight = (state["step"].to(torch.float64) + 1) ** r * largest**lr_power
        weights = state["weights"] + weight
        share = torch.where(weights > 0, weight / weights, 0.0)
        inner = leaf_by_leaf(slots, lambda done: at(done, rate, share))
        updates, new = inner.update(grads, state, params)
        return updates, {**new, "weights": weights, "largest": largest}

    def evaluate(params: Any, state: dict[str, Any]) -> Any:
        return each(lambda y, z: y + (z - y) * (1 - 1 / beta1), params, state["z"])

    return Optimizer(init, update, evaluate)
