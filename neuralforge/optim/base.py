"""What all optimizers share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch.utils._pytree import tree_leaves, tree_map

Schedule = Callable[[torch.Tensor], torch.Tensor]
"""Learning rate by step: a function of the number of finished updates (an int64 scalar tensor)."""


class Optimizer(NamedTuple):
    """`init(params) -> state` and `update(grads, state, params) -> (new_params, new_state)`, on equal pytrees of
    tensors. Both are pure; the state is a pytree of tensors."""

    init: Callable[[Any], Any]
    update: Callable[[Any, Any, Any], tuple[Any, Any]]


def learning_rate(lr: float | Schedule, step: torch.Tensor) -> torch.Tensor | float:
    return lr(step) if callable(lr) else lr


def global_norm(tree: Any) -> torch.Tensor:
    """The Euclidean norm of all elements of a pytree together: a float32 scalar (float64 for float64 leaves)."""
    leaves = tree_leaves(tree)
    dtype = torch.float64 if any(x.dtype == torch.float64 for x in leaves) else torch.float32
    squares = [x.to(dtype).square().sum() for x in leaves]
    return torch.stack(squares).sum().sqrt()


def clip_by_global_norm(grads: Any, max_norm: float) -> tuple[Any, torch.Tensor]:
    """Scale the gradients so that their global norm is at most `max_norm`; returns them and the norm before, as
    torch.nn.utils.clip_grad_norm_ does (Pascanu et al. 2013, https://arxiv.org/abs/1211.5063)."""
    norm = global_norm(grads)
    scale = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    return tree_map(lambda g: g * scale.to(g.dtype), grads), norm
