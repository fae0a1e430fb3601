"""Vectorising: a function of one example becomes a function of a batch.

The function is captured on one example, which traces away whatever transforms are inside it, and the graph of plain
operators is run with PyTorch's batching rules (`torch.func.vmap`). Tracers around it see the batched operators only,
so `vmap` nests with every other transform.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import wraps
from typing import Any

import torch
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack
from torch.utils._pytree import _broadcast_to_and_flatten

from ..errors import CaptureError
from ..graph import Graph, Value, capture, gradient_mode
from ..graph.capture import Capture, Whole
from ..graph.ir import Equation
from ..graph.source import user_line
from ..graph.tree import tree_flatten, tree_unflatten
from .custom import batch_axes
from .forward import Forward
from .tape import Tape

aten = torch.ops.aten


def vmap(f: Callable, in_axes: Any = 0, out_axes: Any = 0) -> Callable:
    """`f` over an axis of its arguments. `in_axes`: that axis, an integer for all, or a tuple with an entry (an
    integer, None for what isn't batched, or a pytree of them) for each argument. Tensors passed by keyword are batched at
    axis 0. Results have the batch at `out_axes`, an integer or a pytree of them.

    Random numbers differ between examples. Raises CaptureError where batch sizes differ, nothing is batched, or `f`
    writes to its arguments.
    """

    @wraps(f)
    def batched(*args: Any, **kwargs: Any) -> Any:
        if kwargs:
            axes = (in_axes,) * len(args) if isinstance(in_axes, int) else tuple(in_axes)
            return vmap(lambda args, kwargs: f(*args, **kwargs), (axes, batch_axes(kwargs)), out_axes)(args, kwargs)
        leaves, tree = tree_flatten(args)
        axes = _axes(in_axes, args, tree)
        sizes = {x.shape[a] for x, a in zip(leaves, axes) if a is not None}
        if len(sizes) != 1:
            raise CaptureError(
                f"{user_line()}: vmap over axes of {'different sizes ' + str(sorted(sizes)) if sizes else 'nothing'}; "
                f"in_axes={in_axes} must name axes of one size in at least one argument."
            )
        examples = [x if a is None else _example(x, a) for x, a in zip(leaves, axes)]
        captured = capture(f, *tree_unflatten(examples, tree), whole=_may_be_differentiated())
        if captured.writes:
            raise CaptureError(f"{user_line()}: the function given to vmap writes in place to its arguments. Return new values.")
        order = tree_unflatten([None] * captured.out_tree.num_leaves, captured.out_tree)
        to = _broadcast_to_and_flatten(_in_order(out_axes, order), captured.out_tree)
        if to is None:
            raise CaptureError(f"{user_line()}: out_axes={out_axes} doesn't fit results of structure {captured.out_tree}.")
        if 0 in sizes:
            flat = [_none_of(y) if isinstance(y, Value) else y for y in captured.graph.outputs]
        else:
            flat = _run(captured.graph, leaves, axes)
        flat = [y.movedim(0, i) if isinstance(y, torch.Tensor) else y for y, i in zip(flat, to)]
        return tree_unflatten(flat, captured.out_tree)

    return batched


def _batched_copy(info: Any, in_dims: tuple, x: torch.Tensor, source: torch.Tensor, non_blocking: bool = False) -> tuple:
    """The batching rule that PyTorch lacks of what x.copy_(source) is captured as."""
    x = x.expand(info.batch_size, *x.shape) if in_dims[0] is None else x.movedim(in_dims[0], 0)
    if in_dims[1] is not None:
        source = source.movedim(in_dims[1], 0)
        source = source.reshape(source.shape[0], *[1] * (x.dim() - source.dim()), *source.shape[1:])
    return aten.copy.default(x, source, non_blocking), 0


def _batched_conj(info: Any, in_dims: tuple, x: torch.Tensor) -> tuple:
    return aten._conj_physical.default(x), in_dims[0]


torch.library.register_vmap("aten::copy", _batched_copy)
torch.library.register_vmap("aten::_conj_physical", _batched_conj)


def _select_scatter(x: torch.Tensor, source: torch.Tensor, dim: int, index: int) -> torch.Tensor:
    index %= x.shape[dim]
    return aten.slice_scatter(x, source.unsqueeze(dim), dim, index, index + 1)


def _slice_scatter(x: torch.Tensor, source: torch.Tensor, dim: int = 0, start: Any = None, end: Any = None, step: int = 1) -> Any:
    return aten.slice_scatter(x, source, dim, start, end if end is None else min(end, x.shape[dim]), step)


_REPLACED = {aten.select_scatter.default: _select_scatter, aten.slice_scatter.default: _slice_scatter}
"""Operators whose batching rules in PyTorch 2.13 are wrong: of the first the derivative (it scatters to each place several
times), of the second what x[1:], which ends at 2^63 - 1, makes of it."""


def _may_be_differentiated() -> bool:
    """Is a transform at work outside, to which functions with derivative rules of their own must stay whole?"""
    return any(
        isinstance(mode, (Tape, Forward)) or isinstance(mode, Capture) and mode.whole
        for mode in _get_current_dispatch_mode_stack()
    )


def _run(graph: Graph, leaves: list, axes: list[int | None]) -> list:
    """The graph's outputs for all examples, the batch first."""
    tensors = [x for x in leaves if isinstance(x, torch.Tensor)]
    at = [a for x, a in zip(leaves, axes) if isinstance(x, torch.Tensor)]
    known = dict(zip(graph.inputs, zip(tensors, at)))  # each value's tensor and the axis of the batch
    known.update((v, (x, None)) for v, x in graph.constants.items())
    start = 0
    for i, eq in enumerate(graph.equations):
        if isinstance(eq.op, Whole):
            later = [v for other in graph.equations[i:] for v in other.inputs]
            later += [v for v in graph.outputs if isinstance(v, Value)]
            _run_part(graph.equations[start:i], known, list(dict.fromkeys(later)))
            _run_whole(eq, known)
            start = i + 1
    rest = Graph(list(known), {}, graph.equations[start:], graph.outputs)
    return _run_batched(rest, [known[v][0] for v in rest.inputs], tuple(known[v][1] for v in rest.inputs))


def _run_part(equations: list, known: dict[Value, tuple], wanted: list[Value]) -> None:
    """Add to `known` what the equations compute of the wanted values."""
    made = {v for eq in equations for v in eq.results}
    outputs = [v for v in wanted if v in made]
    if outputs:
        part = Graph(list(known), {}, equations, outputs)
        found = _run_batched(part, [known[v][0] for v in part.inputs], tuple(known[v][1] for v in part.inputs))
        known.update((v, (x, 0)) for v, x in zip(outputs, found))


def _run_whole(eq: Equation, known: dict[Value, tuple]) -> None:
    """Call a function with a derivative rule of its own, for all examples."""
    flat = [known[v][0] if isinstance(v, Value) else v for v in eq.args]
    axes = [known[v][1] if isinstance(v, Value) else None for v in eq.args]
    batch = None if all(a is None for a in axes) else 0
    function = eq.op.function if batch is None else eq.op.function.batched(vmap, eq.op.args(axes))
    out = function(*eq.op.args(flat))
    known.update((v, (x, batch)) for v, x in zip(eq.outputs, tree_flatten(out)[0]) if isinstance(v, Value))


def _run_batched(graph: Graph, tensors: list, at: tuple[int | None, ...]) -> list:
    """The outputs of a graph of plain operators, the batch first."""
    found: dict[int, Any] = {}

    equations = [replace(eq, op=_REPLACED.get(eq.op, eq.op)) for eq in graph.equations]
    graph = graph.replace(equations=equations)

    def run(*values: torch.Tensor) -> list[torch.Tensor]:
        outputs = graph(*values)
        found.update((i, y) for i, y in enumerate(outputs) if not isinstance(y, torch.Tensor))
        return [y for y in outputs if isinstance(y, torch.Tensor)]

    warn = torch._C._functorch._set_vmap_fallback_warning_enabled
    warn(False)  # of operators that are called for one example after another: attention
    try:
        with gradient_mode.no_autograd():
            results = iter(torch.func.vmap(run, at, randomness="different")(*tensors))
    finally:
        warn(True)  # PyTorch's default
    return [found[i] if i in found else next(results) for i in range(len(graph.outputs))]


def _example(x: torch.Tensor, axis: int) -> torch.Tensor:
    """One example's tensor; its values aren't read."""
    x = x.detach()
    return x.select(axis, 0) if x.shape[axis] else x.sum(axis)


def _none_of(y: Value) -> torch.Tensor:
    """A batch of no such tensors."""
    return torch.empty(0, *y.shape, dtype=y.dtype, device=y.device)


def _in_order(axes: Any, like: Any) -> Any:
    """Axes with the keys of dictionaries in the order of those in `like`."""
    if isinstance(axes, dict) and isinstance(like, dict) and axes.keys() == like.keys():
        return type(like)((key, _in_order(axes[key], like[key])) for key in like)
    if type(axes) in (tuple, list) and isinstance(like, (tuple, list)) and len(axes) == len(like):
        return type(axes)(_in_order(a, x) for a, x in zip(axes, like))
    return axes


def _axes(in_axes: Any, args: tuple, tree: Any) -> list[int | None]:
    """The axis of each leaf of the arguments."""
    if isinstance(in_axes, int):
        in_axes = tuple([in_axes] * len(args))
    flat = _broadcast_to_and_flatten(_in_order(tuple(in_axes), args), tree, is_leaf=lambda x: x is None)
    if flat is None or len(in_axes) != len(args):
        raise CaptureError(f"{user_line()}: in_axes={in_axes} doesn't fit {len(args)} arguments; give an entry for each.")
    leaves = tree_flatten(args)[0]
    flat = [None if x is None else a for x, a in zip(leaves, flat)]
    for x, a in zip(leaves, flat):
        if a is not None and (not isinstance(x, torch.Tensor) or not -x.dim() <= a < x.dim()):
            what = f"a tensor of shape {tuple(x.shape)}" if isinstance(x, torch.Tensor) else repr(x)
            raise CaptureError(f"{user_line()}: in_axes asks for axis {a} of {what}; use None for what isn't batched.")
    return flat
