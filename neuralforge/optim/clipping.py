"""Clipping of gradients."""

from __future__ import annotations

from typing import Any

import torch

from ..graph.tree import tree_leaves
from .base import Optimizer, absolute_squares, each, norm_dtype
from .checks import check


def global_norm(tree: Any) -> torch.Tensor:
    """The Euclidean norm of all elements of a pytree together: a float32 scalar (float64 for leaves of 64 bits)."""
    leaves = [x for x in tree_leaves(tree) if x is not None]
    dtype = norm_dtype(leaves)
    squares = [absolute_squares(x, dtype).sum() for x in leaves]
    return torch.stack(squares).sum().sqrt() if squares else torch.zeros((), dtype=dtype)


def clip_gradients(grads: Any, max_norm: float) -> tuple[Any, torch.Tensor]:
    """Scale the gradients so that their global norm is at most `max_norm`; returns them and the norm before, as
    torch.nn.utils.clip_grad_norm_ does (Pascanu et al. 2013, https://arxiv.org/abs/1211.5063)."""
    norm = global_norm(grads)
    scale = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    return each(lambda g: g * scale.to(g.dtype), grads), norm


def clip_by_global_norm(max_norm: float) -> Optimizer:
    """`clip_gradients` as the first link of a chain. The state holds `norm`, that of the newest gradients before."""
    check("clip_by_global_norm", max_norm=(max_norm, max_norm > 0, "above 0"))

    def update(grads: Any, state: Any, params: Any, **_: Any) -> tuple[Any, dict[str, torch.Tensor]]:
        grads, norm = clip_gradients(grads, max_norm)
        return grads, {"norm": norm.to(torch.float32)}

    return Optimizer(lambda params: {"norm": torch.zeros(())}, update)


def clip_adaptively(share: float = 0.01, eps: float = 1e-3) -> Optimizer:
    """Adaptive gradient clipping (Brock et al. 2021, https://arxiv.org/abs/2102.06171), a link of a chain: the gradient of each
    unit (a row of a matrix, a filter of a convolution, a vector whole) is scaled so that its norm is at most `share` of that
    of its weights, which counts as at least `eps`."""
    check("clip_adaptively", share=(share, share > 0, "above 0"), eps=(eps, eps > 0, "above 0"))

    def clip(g: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
        most = share * _unit_norm(p).clamp(min=eps)
        norm = _unit_norm(g)
        return g * torch.where(norm > most, most / norm.clamp(min=1e-6), 1.0).to(g.dtype)

    return Optimizer(lambda params: (), lambda grads, state, params, **_: (each(clip, grads, params), state))


def _unit_norm(x: torch.Tensor) -> torch.Tensor:
    squares = absolute_squares(x, x.dtype.to_real())
    return (squares.sum() if x.dim() < 2 else squares.sum(tuple(range(1, x.dim())), keepdim=True)).sqrt()
