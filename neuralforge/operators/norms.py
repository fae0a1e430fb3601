"""Normalisation of rows."""

from __future__ import annotations

import torch

from .compiled import operator, wide


@operator
def layer_norm(x: torch.Tensor, weight: torch.Tensor | None = None, bias: torch.Tensor | None = None, eps: float = 1e-5) -> torch.Tensor:
    """Rows of `x` [..., D] with mean 0 and variance 1, times `weight` [D], plus `bias` [D]. Computed in float32 at least, in
    x's dtype. (Ba et al. 2016, https://arxiv.org/abs/1607.06450)"""
    y = wide(x)
    y = y - y.mean(-1, keepdim=True)
    y = y * torch.rsqrt((y * y).mean(-1, keepdim=True) + eps)
    y = y if weight is None else y * weight
    return (y if bias is None else y + bias).to(x.dtype)


@operator
def rms_norm(x: torch.Tensor, weight: torch.Tensor | None = None, eps: float = 1e-6) -> torch.Tensor:
    """Rows of `x` [..., D] with mean square 1, times `weight` [D]. Computed in float32 at least, in x's dtype. (Zhang &
    Sennrich 2019, https://arxiv.org/abs/1910.07467)"""
    y = wide(x)
    y = y * torch.rsqrt((y * y).mean(-1, keepdim=True) + eps)
    return (y if weight is None else y * weight).to(x.dtype)
