"""Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon): momentum made orthogonal, for hidden matrices."""

from __future__ import annotations

import math
from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Any, Literal

import torch

from ..errors import ConfigError
from ..graph.tree import tree_flatten, tree_unflatten
from .base import Optimizer, Schedule, each, learning_rate, like_parameters, zeros
from .checks import check, check_real, is_at_least_0, is_rate, is_share
from .groups import named_leaves

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
SCALINGS = {
    "original": lambda rows, columns: math.sqrt(max(1.0, rows / columns)),
    "match_rms_adamw": lambda rows, columns: 0.2 * math.sqrt(max(rows, columns)),
}


def muon(
    lr: float | Schedule,
    momentum: float = 0.95,
    nesterov: bool = True,
    weight_decay: float = 0.1,
    scaling: Literal["original", "match_rms_adamw"] = "original",
    steps: int = 5,
    blocks: Mapping[str, int] | None = None,
    dtype: torch.dtype | None = None,
) -> Optimizer:
    """Momentum, replaced by (nearly) the closest matrix with orthogonal rows or columns. For the hidden matrices of a model;
    embeddings, the output layer and vectors want AdamW:

        groups({"*embedding*": adamw(lr), "*norm*": adamw(lr), "*.bias": adamw(lr), "*": muon(0.02)})

    `scaling` of the step: "original" by sqrt(max(1, rows / columns)); "match_rms_adamw" by 0.2 sqrt(max(rows, columns)) (Liu
    et al. 2025, https://arxiv.org/abs/2502.16982), with which AdamW's rate and decay can be kept. `blocks` says, by
    patterns of names, of how many matrices stacked by rows a fused one consists, `{"*.qkv.weight": 3}`: each is made orthogonal
    by itself. `dtype` is that of the Newton–Schulz iteration (default: the parameter's).

    The state holds `step` and `m`, shaped like the parameters. Raises ConfigError for a value out of range, for a parameter that
    isn't a real matrix, and for rows that don't split into the blocks.
    """
    check(
        "muon",
        lr=is_rate(lr),
        momentum=is_share(momentum),
        weight_decay=is_at_least_0(weight_decay),
        scaling=(scaling, scaling in SCALINGS, " or ".join(SCALINGS)),
        steps=(steps, steps >= 1, "at least 1"),
        blocks=(blocks, all(n >= 1 for n in (blocks or {}).values()), "whole numbers of at least 1"),
    )

    def parts(name: str, p: torch.Tensor) -> int:
        count = next((n for pattern, n in (blocks or {}).items() if fnmatchcase(name, pattern)), 1)
        if p.dim() != 2:
            raise ConfigError(
                f"muon: the parameter {name or 'given'} has the shape {tuple(p.shape)}; expected a matrix. Give it to adamw, with groups()."
            )
        if p.shape[0] % count:
            raise ConfigError(f"muon: the {p.shape[0]} rows of {name} don't split into blocks={count}.")
        return count

    def init(params: Any) -> dict[str, Any]:
        check_real("muon", params)
        for name, p in named_leaves(params).items():
            if p is not None:
                parts(name, p)
        return {"step": torch.zeros((), dtype=torch.int64), "m": each(zeros, params)}

    def update(grads: Any, state: dict[str, Any], params: Any, **_: Any) -> tuple[Any, dict[str, Any]]:
        rate = learning_rate(lr, state["step"])
        tree = tree_flatten(params)[1]
        updates, new = [], []
        kept = like_parameters(tree, "gradients", grads), like_parameters(tree, "m", state["m"])
        for (name, p), g, m in zip(named_leaves(params).items(), *kept):
            if p is None:
                updates.append(None)
                new.append(None)
                continue
            m = m + (g - m) * (1 - momentum)
            direction = g + (m - g) * momentum if nesterov else m
            stacked = direction.unflatten(0, (parts(name, p), -1)) if p.shape[0] else direction[None]
            u = orthogonal(stacked.to(dtype or p.dtype), steps).to(p.dtype).flatten(0, 1)
            u = u * SCALINGS[scaling](*stacked.shape[1:]) if p.numel() else u
            updates.append((u + p * weight_decay if weight_decay else u) * -rate)
            new.append(m)
        return tree_unflatten(updates, tree), {"step": state["step"] + 1, "m": tree_unflatten(new, tree)}

    return Optimizer(init, update)


def orthogonal(x: torch.Tensor, steps: int = 5, eps: float = 1e-7) -> torch.Tensor:
    """For each matrix of [blocks, rows, columns] one with the same singular vectors and singular values near 1 (about 0.7 to
    1.2), by a quintic Newton–Schulz iteration in matrix products only."""
    a, b, c = COEFFICIENTS
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    x = x / x.square().sum((-2, -1), keepdim=True).sqrt().clamp(min=eps)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * (gram @ gram)) @ x
    return x.mT if tall else x
