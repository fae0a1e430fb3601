"""Gradients of a large batch, summed over micro-batches; and what their scatter tells, at no further memory.

    sums = accumulation.empty(params)
    for micro in batch:
        loss, grads = value_and_grad(loss_fn)(params, micro)
        sums = accumulation.add(sums, loss, grads, weight=(micro["targets"] != -100).sum())
    loss, grads = accumulation.mean(sums)

Jit the body of the loop with `donate=0`: then neither time to compile nor memory grows with the number of micro-batches.
`sums` is a flat pytree of tensors.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from ..graph.tree import tree_flatten, tree_leaves, tree_unflatten
from .base import absolute_squares, each, like_parameters, norm_dtype

Sums = dict[str, Any]


def empty(params: Any) -> Sums:
    """Sums over no micro-batch yet, for gradients like `params` (kept in float32 at least)."""
    wide = lambda p: torch.promote_types(p.dtype, torch.float32)
    zero = lambda: torch.zeros((), dtype=norm_dtype(tree_leaves(params)))
    return {
        "grads": each(lambda p: torch.zeros_like(p, dtype=wide(p), requires_grad=False), params),
        "squares": torch.zeros(len(tree_leaves(params)), dtype=norm_dtype(tree_leaves(params))),
        "loss": zero(),
        "weight": zero(),
        "count": zero(),
    }


def add(sums: Sums, loss: torch.Tensor, grads: Any, weight: float | torch.Tensor = 1.0) -> Sums:
    """With one more micro-batch, of mean loss `loss` and gradients `grads`. `weight` is what the mean is over: the number
    of targets that count. One of weight 0 is ignored, even if its mean, over nothing, is NaN."""
    dtype, tree = sums["weight"].dtype, tree_flatten(sums["grads"])[1]
    grads = tree_unflatten(like_parameters(tree, "gradients", grads), tree)
    weight = torch.as_tensor(weight).to(dtype)
    weighed = lambda x: torch.where(weight > 0, x * weight.to(x.dtype), 0)
    return {
        "grads": each(lambda s, g: s + weighed(g.to(s.dtype)), sums["grads"], grads),
        "squares": sums["squares"] + weighed(squares(grads)),
        "loss": sums["loss"] + weighed(loss.to(dtype)),
        "weight": sums["weight"] + weight,
        "count": sums["count"] + (weight > 0),
    }


def mean(sums: Sums) -> tuple[torch.Tensor, Any]:
    """Loss and gradients of all micro-batches as one batch."""
    return sums["loss"] / sums["weight"], each(lambda g: g / sums["weight"].to(g.dtype), sums["grads"])


class Statistics(NamedTuple):
    """Estimates from one step, float tensors. `signal` and `noise` are [] for the whole gradient and unbiased (McCandlish
    et al. 2018, https://arxiv.org/abs/1812.06162, appendix A.1), so either may come out negative."""

    signal: torch.Tensor
    """Square of the true gradient's norm, |G|^2."""
    noise: torch.Tensor
    """Trace of the gradient's covariance for weight 1 (a token): that of this step's gradient times the weight."""
    snr: torch.Tensor
    """Signal-to-noise ratio of this step's gradient: signal / (noise / weight)."""
    cosine: torch.Tensor
    """Mean inner product of two micro-batches' gradients over the mean square of their norms: where these are equal, the
    mean cosine. Near 0, the micro-batches tell different things, and more of them would help."""
    norms: torch.Tensor
    """[leaves]: norm of each parameter's gradient, of the whole batch, in the order of `tree_leaves(params)`."""
    cosines: torch.Tensor
    """[leaves]: as `cosine`, for each parameter."""


def statistics(sums: Sums) -> Statistics:
    """What two or more micro-batches tell of the gradient's noise; not finite for fewer.

    A gradient over weight w has the expected square |G|^2 + noise / w. The micro-batches' squares, averaged by their
    weights, are over w = weight / count; that of the whole batch is over the whole weight: two equations for two unknowns.
    """
    weight, count = sums["weight"], sums["count"]
    small, big = sums["squares"] / weight, squares(sums["grads"]) / weight**2
    signals = (count * big - small) / (count - 1)
    signal, noise = signals.sum(), weight * (small - big).sum() / (count - 1)
    return Statistics(signal, noise, signal * weight / noise, signal / small.sum(), big.sqrt(), signals / small)


def squares(tree: Any) -> torch.Tensor:
    """[leaves]: each leaf's square of the Euclidean norm, float32 (float64 if a leaf has numbers of 64 bits)."""
    leaves = tree_leaves(tree)
    dtype = norm_dtype(leaves)
    return torch.stack([torch.zeros((), dtype=dtype) if x is None else absolute_squares(x, dtype).sum() for x in leaves])
