"""Training where gradients may overflow or underflow, as in float16 (Micikevicius et al. 2018, https://arxiv.org/abs/1710.03740).

    optimizer = optim.loss_scaling(optim.adamw(1e-3))
    ...  # inside of the jitted step
    loss, grads = optim.scaled_value_and_grad(loss_fn)(state["optimizer"]["scale"], params, batch)
    updates, optimizer_state = optimizer.update(grads, state["optimizer"], params)

The scale moves as torch.amp.GradScaler's does, but inside of the graph: no step waits for a number.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ..autograd import value_and_grad
from ..errors import ConfigError
from .base import Optimizer, each
from .clipping import global_norm


def scaled_value_and_grad(f: Callable, has_aux: bool = False) -> Callable:
    """`g(scale, *args)` gives what `value_and_grad(f, has_aux=has_aux)(*args)` gives, differentiating `scale * f`: small
    gradients then don't vanish on their way through float16. Value and gradients are divided by the scale again, the
    latter in float32 at least."""

    def scaled(scale: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        def product(*args: Any, **kwargs: Any) -> Any:
            out = f(*args, **kwargs)
            value, aux = out if has_aux else (out, None)
            return value.to(_wide(value)) * scale, (value, aux)

        (_, (value, aux)), grads = value_and_grad(product, has_aux=True)(*args, **kwargs)
        inverse = 1 / scale
        grads = each(lambda g: g.to(_wide(g)) * inverse.to(_wide(g)), grads)
        return ((value, aux) if has_aux else value), grads

    return scaled


def loss_scaling(
    optimizer: Optimizer,
    init_scale: float = 2.0**16,
    growth_factor: float = 2.0,
    backoff_factor: float = 0.5,
    growth_interval: int = 2000,
) -> Optimizer:
    """`optimizer`, except that an update from gradients that aren't all finite is skipped: parameters and state stay as
    they are, bit for bit, and the scale is multiplied by `backoff_factor`. After `growth_interval` updates in a row it
    is multiplied by `growth_factor`.

    The state holds `scale` (float32 scalar), `good` (int32: updates since the scale was set), `skipped` (int64: skipped
    updates in all) and `optimizer`, that of the optimizer within. Gradients go in unscaled, as `scaled_value_and_grad`
    gives them; clipping belongs within, `loss_scaling(chain(clip_by_global_norm(1.0), ...))`. Raises ConfigError for a value
    out of range.
    """
    for name, value, ok, expected in (
        ("init_scale", init_scale, 0 < init_scale < float("inf"), "a number above 0"),
        ("growth_factor", growth_factor, growth_factor >= 1, "at least 1"),
        ("backoff_factor", backoff_factor, 0 < backoff_factor < 1, "a number in (0, 1)"),
        ("growth_interval", growth_interval, growth_interval >= 1, "at least 1"),
    ):
        if not ok:
            raise ConfigError(f"loss_scaling: {name}={value!r}; expected {expected}.")

    def init(params: Any) -> dict[str, Any]:
        return {
            "scale": torch.tensor(init_scale, dtype=torch.float32),
            "good": torch.zeros((), dtype=torch.int32),
            "skipped": torch.zeros((), dtype=torch.int64),
            "optimizer": optimizer.init(params),
        }

    def update(grads: Any, state: dict[str, Any], params: Any, **extra: Any) -> tuple[Any, dict[str, Any]]:
        finite = all_finite(grads)
        updates, new = optimizer.update(grads, state["optimizer"], params, **extra)
        # Not 0.0: -0.0 is the number that changes no other in a sum, -0.0 included.
        updates = each(lambda u: torch.where(finite, u, -0.0), updates)
        good = torch.where(finite, state["good"] + 1, 0)
        grow = good == growth_interval
        larger = state["scale"] * growth_factor
        scale = torch.where(grow & larger.isfinite(), larger, state["scale"])
        return updates, {
            "scale": torch.where(finite, scale, state["scale"] * backoff_factor),
            "good": torch.where(grow, 0, good),
            "skipped": state["skipped"] + ~finite,
            "optimizer": keep_if(finite, new, state["optimizer"]),
        }

    return Optimizer(init, update, lambda params, state: optimizer.evaluate(params, state["optimizer"]))


def all_finite(tree: Any) -> torch.Tensor:
    """Bool scalar: is every element of a pytree a number? Also false where the sum of their squares overflows, above
    1.8e19 for the root in float32; clipping needs that sum anyway."""
    return global_norm(tree).isfinite()


def keep_if(condition: torch.Tensor, new: Any, old: Any) -> Any:
    """The pytree `new` where a bool scalar is true, else `old`."""
    return each(lambda n, o: torch.where(condition, n, o), new, old)


def _wide(x: torch.Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)
