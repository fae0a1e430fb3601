"""Shares of a whole."""

from __future__ import annotations

import torch

from .compiled import operator, wide


@operator
def softmax(x: torch.Tensor, dim: int = -1) -> torch.Tensor:
    """exp(x) / sum(exp(x)) along `dim`. Computed in float32 at least, in x's dtype."""
    y = wide(x).transpose(dim, -1)
    y = (y - y.amax(-1, keepdim=True)).exp()
    return (y / y.sum(-1, keepdim=True)).transpose(dim, -1).to(x.dtype)
