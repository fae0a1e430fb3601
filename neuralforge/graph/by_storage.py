"""`as_strided` and its kin, counted from where their operand begins.

PyTorch counts `storage_offset` from the beginning of the memory, in which a compiled program puts a tensor elsewhere. Without
one they begin where the operand does, wherever that is.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ..errors import CaptureError
from .source import user_line

aten = torch.ops.aten


def from_operand(apply: Callable, func: Callable, args: tuple, kwargs: dict) -> Any:
    """`func(*args, **kwargs)`, of operators without an offset, each applied by `apply(func, args)`."""
    named = {a.name: given for a, given in zip(func._schema.arguments, args)} | kwargs
    x, size, stride, offset = (named.get(name) for name in ("self", "size", "stride", "storage_offset"))
    start = 0 if offset is None else offset - x.storage_offset()
    if start < 0:
        raise CaptureError(
            f"{user_line()}: {func} begins {-start} elements before its operand, in memory which a graph doesn't see. Apply it to the "
            f"larger tensor."
        )

    def begin(x: torch.Tensor) -> torch.Tensor:
        """A view of one element, the one at which to begin."""
        return apply(aten.slice.Tensor, (apply(aten.as_strided.default, (x, [start + 1], [1])), 0, start)) if start else x

    if func.overloadpacket is aten.as_strided_scatter:
        if not start:
            return apply(func, (x, named["src"], size, stride))
        extent = 1 + sum((n - 1) * s for n, s in zip(x.shape, x.stride()))
        flat = apply(aten.as_strided.default, (x, [extent], [1]))
        rest = apply(func, (apply(aten.slice.Tensor, (flat, 0, start)), named["src"], size, stride))
        return apply(aten.as_strided.default, (apply(aten.slice_scatter.default, (flat, rest, 0, start)), x.shape, x.stride()))
    view = apply(aten.as_strided.default, (begin(x), size, stride))
    return view if func.overloadpacket is aten.as_strided else apply(aten.clone.default, (view,))
