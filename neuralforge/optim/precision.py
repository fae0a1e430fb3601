"""Weights of few bits: a master copy in float32, or stochastic rounding in place of one.

A bfloat16 weight has 8 significant bits: what changes it by less than 2^-9 of itself is rounded away, which nearly every
update of late training is, and a weight decay of `lr * weight_decay` always.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch

from .. import random
from ..graph.tree import tree_flatten, tree_leaves, tree_map, tree_unflatten
from .base import Optimizer, each


def autocast(f: Callable, dtype: torch.dtype | None) -> Callable:
    """`f` computing its products in `dtype`, and in float32 what needs that, as torch.autocast says; None leaves it as it
    is. Parameters stay as they are, so float32 ones are the master copy, and their gradients are float32."""
    if dtype is None:
        return f

    @wraps(f)
    def lowered(*args: Any, **kwargs: Any) -> Any:
        device = next(x.device.type for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor))
        with torch.autocast(device, dtype=dtype):
            return f(*args, **kwargs)

    return lowered


def cast(tree: Any, dtype: torch.dtype) -> Any:
    """The floating-point tensors of a pytree in `dtype`; other leaves as they are."""
    return tree_map(lambda x: x.to(dtype) if isinstance(x, torch.Tensor) and x.is_floating_point() else x, tree)


def _wide(tree: Any) -> Any:
    """Tensors of few bits in float32, others as they are."""
    return each(lambda x: x.to(torch.promote_types(x.dtype, torch.float32)), tree)


def master_weights(optimizer: Optimizer) -> Optimizer:
    """`optimizer` for parameters of few bits (bfloat16, float16), working on a float32 copy: its state is `master`, that copy, and
    `optimizer`, the state for it. The updates, float32, take the parameters to the copy's values, rounded to nearest. Parameters of
    more bits are copied as they are."""

    def init(params: Any) -> dict[str, Any]:
        master = each(lambda p: p.detach().clone(), _wide(params))
        return {"master": master, "optimizer": optimizer.init(master)}

    def update(grads: Any, state: dict[str, Any], params: Any, **extra: Any) -> tuple[Any, dict[str, Any]]:
        grads = each(lambda m, g: g.to(m.dtype), state["master"], grads)
        updates, inner = optimizer.update(grads, state["optimizer"], state["master"], **extra)
        master = each(torch.add, state["master"], updates)
        updates = each(lambda m, p: m.to(p.dtype).to(m.dtype) - p, master, params)
        return updates, {"master": master, "optimizer": inner}

    def evaluate(params: Any, state: dict[str, Any]) -> Any:
        return each(lambda m, p: m.to(p.dtype), optimizer.evaluate(state["master"], state["optimizer"]), params)

    return Optimizer(init, update, evaluate)


def stochastic_rounding(optimizer: Optimizer, seed: int = 0) -> Optimizer:
    """`optimizer` for bfloat16 parameters without a master copy: it computes in float32, and the new parameters are rounded
    up or down at random so that their mean is what it computed (Gupta et al. 2015, https://arxiv.org/abs/1502.02551). Those of another
    dtype are updated as always.
    The state is `key`, from which the random numbers come, and `optimizer`."""

    def init(params: Any) -> dict[str, Any]:
        return {"key": random.key(seed), "optimizer": optimizer.init(_wide(params))}

    def update(grads: Any, state: dict[str, Any], params: Any, **extra: Any) -> tuple[Any, dict[str, Any]]:
        flat, tree = tree_flatten(_wide(params))
        narrow = [p is not None and p.dtype == torch.bfloat16 for p in tree_leaves(params)]
        wide = tree_unflatten(flat, tree)
        grads = each(lambda p, g: g.to(p.dtype), wide, grads)
        updates, inner = optimizer.update(grads, state["optimizer"], wide, **extra)
        rounded = [
            stochastic_round(p + u, state["key"], offset=i) - p if few else u
            for i, (p, u, few) in enumerate(zip(flat, tree_leaves(updates), narrow))
        ]
        key = state["key"] + torch.tensor([0, len(flat)])
        return tree_unflatten(rounded, tree), {"key": key, "optimizer": inner}

    def evaluate(params: Any, state: dict[str, Any]) -> Any:
        wide = optimizer.evaluate(_wide(params), state["optimizer"])
        return each(lambda x, p: x.to(p.dtype), wide, params)

    return Optimizer(init, update, evaluate)


def stochastic_round(x: torch.Tensor, key: torch.Tensor, offset: int = 0) -> torch.Tensor:
    """The float32 tensor `x` with each element rounded to one of the two nearest bfloat16 numbers, the nearer the likelier, so
    that the expectation is `x`; as float32. Infinities and NaN stay. `key` and `offset`: see `neuralforge.random.bits`."""
    bits = x.view(torch.int32)  # bfloat16 is the upper half of float32: add a random lower half and cut
    noise = random.bits(key, x.shape, offset=offset) & 0xFFFF
    return torch.where(x.isfinite(), ((bits + noise) & -0x10000).view(torch.float32), x)
