"""Vectorising: a function of one example becomes a function of a batch.

The function is captured on one example, which traces away whatever transforms are inside it, and the graph of plain
operators is run with PyTorch's batching rules (`torch.func.vmap`). Tracers around it see the batched operators only,
so `vmap` nests with every other transform.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch.utils._pytree import _broadcast_to_and_flatten, tree_flatten, tree_unflatten

from ..errors import CaptureError
from ..graph import Graph, Value, capture
from ..graph.source import user_line


def vmap(f: Callable, in_axes: Any = 0, out_axes: Any = 0) -> Callable:
    """`f` over an axis of its arguments. `in_axes`: that axis, an integer for all, or a tuple with an entry (an
    integer, None for what isn't batched, or a pytree of them) for each argument. Results have the batch at `out_axes`,
    an integer or a pytree of them.

    Random numbers differ between examples. Raises CaptureError where batch sizes differ, nothing is batched, or `f`
    writes to its arguments.
    """

    @wraps(f)
    def batched(*args: Any) -> Any:
        leaves, tree = tree_flatten(args)
        axes = _axes(in_axes, args, tree)
        sizes = {x.shape[a] for x, a in zip(leaves, axes) if a is not None}
        if len(sizes) != 1:
            raise CaptureError(
                f"{user_line()}: vmap over axes of {'different sizes ' + str(sorted(sizes)) if sizes else 'nothing'}; "
                f"in_axes={in_axes} must name axes of one size in at least one argument."
            )
        examples = [x if a is None else _example(x, a) for x, a in zip(leaves, axes)]
        captured = capture(f, *tree_unflatten(examples, tree))
        if captured.writes:
            raise CaptureError(f"{user_line()}: the function given to vmap writes in place to its arguments. Return new values.")
        to = _broadcast_to_and_flatten(out_axes, captured.out_tree)
        if to is None:
            raise CaptureError(f"{user_line()}: out_axes={out_axes} doesn't fit results of structure {captured.out_tree}.")
        if 0 in sizes:
            flat = [_none_of(y) if isinstance(y, Value) else y for y in captured.graph.outputs]
        else:
            flat = _run(captured.graph, leaves, axes)
        flat = [y.movedim(0, i) if isinstance(y, torch.Tensor) else y for y, i in zip(flat, to)]
        return tree_unflatten(flat, captured.out_tree)

    return batched


def _run(graph: Graph, leaves: list, axes: list[int | None]) -> list:
    """The graph's outputs for all examples, the batch first."""
    tensors = [x for x in leaves if isinstance(x, torch.Tensor)]
    at = tuple(a for x, a in zip(leaves, axes) if isinstance(x, torch.Tensor))
    found: dict[int, Any] = {}

    def run(*values: torch.Tensor) -> list[torch.Tensor]:
        outputs = graph(*values)
        found.update((i, y) for i, y in enumerate(outputs) if not isinstance(y, torch.Tensor))
        return [y for y in outputs if isinstance(y, torch.Tensor)]

    with torch.no_grad():
        results = iter(torch.func.vmap(run, at, randomness="different")(*tensors))
    return [found[i] if i in found else next(results) for i in range(len(graph.outputs))]


def _example(x: torch.Tensor, axis: int) -> torch.Tensor:
    """One example's tensor; its values aren't read."""
    x = x.detach()
    return x.select(axis, 0) if x.shape[axis] else x.sum(axis)


def _none_of(y: Value) -> torch.Tensor:
    """A batch of no such tensors."""
    return torch.empty(0, *y.shape, dtype=y.dtype, device=y.device)


def _axes(in_axes: Any, args: tuple, tree: Any) -> list[int | None]:
    """The axis of each leaf of the arguments."""
    if isinstance(in_axes, int):
        in_axes = tuple([in_axes] * len(args))
    flat = _broadcast_to_and_flatten(tuple(in_axes), tree, is_leaf=lambda x: x is None)
    if flat is None or len(in_axes) != len(args):
        raise CaptureError(f"{user_line()}: in_axes={in_axes} doesn't fit {len(args)} arguments; give an entry for each.")
    leaves = tree_flatten(args)[0]
    for x, a in zip(leaves, flat):
        if a is not None and (not isinstance(x, torch.Tensor) or not -x.dim() <= a < x.dim()):
            what = f"a tensor of shape {tuple(x.shape)}" if isinstance(x, torch.Tensor) else repr(x)
            raise CaptureError(f"{user_line()}: in_axes asks for axis {a} of {what}; use None for what isn't batched.")
    return flat
