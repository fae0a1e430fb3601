"""AdamW (Loshchilov & Hutter 2019, https://arxiv.org/abs/1711.05101), with torch.optim.AdamW's arithmetic."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from ..errors import ConfigError
from .base import Optimizer, Schedule, learning_rate


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
    for name, value, ok, expected in (
        ("lr", lr, callable(lr) or lr >= 0, "at least 0"),
        ("betas", betas, len(betas) == 2 and all(0 <= b < 1 for b in betas), "two numbers in [0, 1)"),
        ("eps", eps, eps >= 0, "at least 0"),
        ("weight_decay", weight_decay, weight_decay >= 0, "at least 0"),
    ):
        if not ok:
            raise ConfigError(f"adamw: {name}={value!r}; expected {expected}.")
    beta1, beta2 = betas

    def init(params: Any) -> dict[str, Any]:
        zeros = lambda p: torch.zeros_like(p, requires_grad=False)
        return {"step": torch.zeros((), dtype=torch.int64), "m": tree_map(zeros, params), "v": tree_map(zeros, params)}

    def update(grads: Any, state: dict[str, Any], params: Any) -> tuple[Any, dict[str, Any]]:
        step = state["step"] + 1
        rate = learning_rate(lr, state["step"])
        # Bias corrections in float64 scalars: beta2 ** step loses digits in float32.
        t = step.to(torch.float64)
        step_size = rate / (1 - beta1**t)
        root = (1 - beta2**t).sqrt()
        flat, tree = tree_flatten(params)
        new_p, new_m, new_v = [], [], []
        for p, g, m, v in zip(flat, *(tree_flatten(x)[0] for x in (grads, state["m"], state["v"]))):
            m = m + (g - m) * (1 - beta1)
            v = v * beta2 + g * g * (1 - beta2)
            size, correction = step_size.to(p.dtype), root.to(p.dtype)
            if weight_decay and (decay is None or decay(p)):
                p = p * (1 - rate * weight_decay)
            new_p.append(p - size * (m / (v.sqrt() / correction + eps)))
            new_m.append(m)
            new_v.append(v)
        pack = lambda leaves: tree_unflatten(leaves, tree)
        return pack(new_p), {"step": step, "m": pack(new_m), "v": pack(new_v)}

    return Optimizer(init, update)
