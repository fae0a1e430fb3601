"""AdamW's update of many tensors at once."""

from __future__ import annotations

from functools import cache

import torch

from .. import optim
from ..compiler import jit


@torch.library.custom_op("neuralforge::adamw_", mutates_args=("params", "m", "v"))
def adamw_(
    params: list[torch.Tensor],
    grads: list[torch.Tensor],
    m: list[torch.Tensor],
    v: list[torch.Tensor],
    step: int,
    lr: float,
    beta1: float = 0.9,
    beta2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.01,
) -> None:
    """One step of AdamW, in place, on `params` and their moments `m` and `v`, after `step` steps before it. `lr` may change
    from call to call for nothing; the other numbers are compiled in."""
    state = {"step": torch.tensor(step), "m": m, "v": v}
    given = [*params, *m, *v]
    new, state = _update(beta1, beta2, eps, weight_decay)(params, state, grads, torch.tensor(lr, dtype=torch.float64))
    # Results lie in what was given to the program, usually each in its own place.
    moved = [(old, x.clone()) for old, x in zip(given, [*new, *state["m"], *state["v"]]) if old.data_ptr() != x.data_ptr()]
    for old, x in moved:
        old.copy_(x)


@adamw_.register_fake
def _(*args):
    return None


def reference(params, grads, m, v, step, lr, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.01):
    """The truth, in plain operators: new parameters and moments."""
    state = {"step": torch.tensor(step), "m": m, "v": v}
    optimizer = optim.adamw(lr, (beta1, beta2), eps, weight_decay)
    updates, state = optimizer.update(grads, state, params)
    return optim.apply_updates(params, updates), state["m"], state["v"]


@cache
def _update(beta1: float, beta2: float, eps: float, weight_decay: float):
    def run(params, state, grads, rate):
        updates, state = optim.adamw(lambda done: rate, (beta1, beta2), eps, weight_decay).update(grads, state, params)
        return optim.apply_updates(params, updates), state

    return jit(run, donate=(0, 1))
