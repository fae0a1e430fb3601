"""Adafactor (Shazeer & Stern 2018, https://arxiv.org/abs/1804.04235), with torch.optim.Adafactor's arithmetic."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from .base import Optimizer, Rule, Schedule, leaf_by_leaf, learning_rate
from .checks import check, check_real, is_at_least_0, is_rate


def adafactor(
    lr: float | Schedule = 1e-2,
    beta2_decay: float = -0.8,
    eps: tuple[float | None, float] = (None, 1e-3),
    clip: float = 1.0,
    weight_decay: float = 0.0,
    decay: Callable[[torch.Tensor], bool] | None = None,
) -> Optimizer:
    """The mean square of the gradient is kept by rows and columns only, so the state of an n x k matrix is n + k numbers;
    updates are clipped to the root mean square `clip` and are relative to the root mean square of the parameter.

    `lr` bounds the relative step, which is at most 1/sqrt(step); the mean squares decay by `1 - step ** beta2_decay`;
    `eps` is (least root of a mean square, None for the dtype's epsilon; least root mean square of a parameter). `decay(parameter)`
    says which parameters decay (default: all). The state holds `step`, `rows` and `columns` for tensors of two dimensions and
    more, and `v` for the others. Raises ConfigError for a value out of range and for complex parameters.
    """
    check(
        "adafactor",
        lr=is_rate(lr),
        beta2_decay=(beta2_decay, beta2_decay <= 0, "at most 0"),
        eps=(eps, len(eps) == 2 and (eps[0] is None or eps[0] >= 0) and eps[1] >= 0, "None or a number, and a number, at least 0"),
        clip=(clip, clip > 0, "above 0"),
        weight_decay=is_at_least_0(weight_decay),
    )

    def at(done: torch.Tensor) -> Rule:
        t = done.to(torch.float64) + 1
        rate, new_share = torch.as_tensor(learning_rate(lr, done), dtype=torch.float64), t**beta2_decay
        relative = torch.minimum(rate, t**-0.5)

        def rule(
            p: torch.Tensor, g: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor, v: torch.Tensor
        ) -> tuple[torch.Tensor, ...]:
            least = torch.finfo(p.dtype).eps if eps[0] is None else eps[0]
            share = new_share.to(p.dtype)
            square = g * g
            if p.dim() > 1:
                rows = rows + (_mean(square, -1) - rows) * share
                columns = columns + (_mean(square, -2) - columns) * share
                estimate = rows * columns / _mean(rows, -2).clamp(min=least)
            else:
                estimate = v = v + (square - v) * share
            u = g * estimate.clamp(min=least * least).rsqrt()
            step = relative.to(p.dtype) * _rms(p).clamp(min=eps[1])
            u = u * (-step / (_rms(u) / clip).clamp(min=1.0))
            if weight_decay and (decay is None or decay(p)):
                u = u - p * (rate.to(p.dtype) * weight_decay)
            return u, rows, columns, v

        return rule

    matrix = lambda make: lambda p: make(p) if p.dim() > 1 else p.new_zeros(0)
    slots = {
        "rows": matrix(lambda p: p.new_zeros(*p.shape[:-1], 1)),
        "columns": matrix(lambda p: p.new_zeros(*p.shape[:-2], 1, p.shape[-1])),
        "v": lambda p: torch.zeros_like(p) if p.dim() < 2 else p.new_zeros(0),
    }
    optimizer = leaf_by_leaf(slots, at)

    def init(params: Any) -> dict[str, Any]:
        check_real("adafactor", params)
        return optimizer.init(params)

    return optimizer._replace(init=init)


def _mean(x: torch.Tensor, dim: int) -> torch.Tensor:
    return x.sum(dim, keepdim=True) / max(x.shape[dim], 1)  # of nothing 0, not NaN, which would stay in the state


def _rms(x: torch.Tensor) -> torch.Tensor:
    return (x.square().sum() / max(x.numel(), 1)).sqrt()
