"""`Tensor.numpy()` of a differentiated tensor is an error, as in torch.autograd: NumPy's operations are out of sight, and the
derivative would silently be zero."""

from __future__ import annotations

from functools import wraps
from typing import Any

import torch

from ..errors import DifferentiationError
from ..graph.source import user_line
from .custom import differentiating

_numpy = torch.Tensor.numpy


@wraps(_numpy)
def numpy(x: torch.Tensor, **kwargs: Any) -> Any:
    if torch._C._len_torch_dispatch_stack() and differentiating(x) is not None:
        raise DifferentiationError(
            f"{user_line()}: .numpy() of a differentiated tensor of shape {tuple(x.shape)}; the derivative can't follow NumPy's "
            f"operations. Use torch's, or make an operator of them with nf.opaque and give it a derivative with "
            f"nf.custom_vjp. If none is wanted, say x.detach().numpy()."
        )
    return _numpy(x, **kwargs)


torch.Tensor.numpy = numpy
