"""Reverse mode: a tape under the dispatcher.

The same tape serves eager code (on real tensors) and captured code (on fake tensors, where the operators of the
backward pass are captured in their turn). As in PyTorch, a tensor holds the node that made it, and a node holds its
parents: what nobody can reach any more is freed. Backward frees each node's residuals as it goes.

An operator with a rule is claimed; one without descends into its definition, whose parts are taped.
"""

from __future__ import annotations

import heapq
import itertools
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch

from ..errors import DifferentiationError
from ..graph import gradient_mode, source
from ..graph.ir import op_name
from ..graph.tracer import Tracer
from ..graph.without_sympy import numbers_only
from .rules.table import Joint, find_definition, find_rule

_order = itertools.count()
_NOTHING = nullcontext()


class Node:
    """One operator's place on the tape. `edges` lead to its arguments: (parent, vjp, like), each of parent and like
    being a list where the argument is a list of tensors. A watched input is a node without edges. `results` counts
    the tensors returned; None: one, by itself. `op` is an operator or a name."""

    __slots__ = ("order", "edges", "results", "op", "source")

    def __init__(self, edges: list | None, results: int | None, op: Any):
        self.order = next(_order)
        self.edges = edges
        self.results = results
        self.op = op
        self.source = source.user_line() if source.capturing else ""


class Tape(Tracer):
    """Records what is computed from watched tensors; `pull` carries cotangents back to them."""

    constant = Tracer.paused

    def watch(self, x: torch.Tensor) -> torch.Tensor:
        """An alias of `x` to compute with: derivatives are taken with respect to it."""
        alias = torch.ops.aten.alias.default(x)
        self.watch_itself(alias)
        return alias

    def watch_itself(self, x: torch.Tensor) -> None:
        """Watch the caller's own tensor object, until `forget`."""
        x.__dict__[self.key] = Node([], None, "input"), 0

    def forget(self, x: torch.Tensor) -> None:
        x.__dict__.pop(self.key, None)

    def record(self, func: Callable, args: tuple, kwargs: dict, known: Any = None) -> Any:
        """`known` is the result, where it needn't be computed."""
        key, tracked = self.key, False
        parents = []
        for a in args:
            parent = a.__dict__.get(key) if isinstance(a, torch.Tensor) else _parents(a, key)
            parents.append(parent)
            if parent is not None:
                tracked = True
        in_kwargs = any(_parents(v, key) for v in kwargs.values()) if kwargs else False
        if not tracked and not in_kwargs:
            return func(*args, **kwargs) if known is None else known
        if gradient_mode.state.off:
            return func(*args, **kwargs) if known is None else known
        found = find_rule(func)
        if found is None or in_kwargs:
            if known is not None:
                raise missing_rule(func)
            return self._descend(func, args, kwargs)
        out = func(*args, **kwargs) if known is None else known
        single = isinstance(out, torch.Tensor)
        places = [r for r in enumerate((out,) if single else out) if differentiable(r[1])]
        if not places:
            return out
        derivatives = found.derivatives(out, *args, **kwargs)
        if derivatives is None:
            return out
        edges = _edges(func, derivatives, args, parents)
        if edges:
            node = Node(edges, None if single else len(out), func)
            for i, r in places:
                r.__dict__[key] = (node, i)
        return out

    def attach(self, outputs: Sequence[Any], inputs: Sequence[Any], vjp: Callable[[list], Sequence], name: str) -> list:
        """Record a computation done while the tape was paused as one node. `vjp` takes the cotangents of the outputs
        (None where nothing arrives) and gives those of the inputs. Returns aliases of the outputs, on the tape."""
        at = [i for i, x in enumerate(inputs) if self.node(x) is not None]
        parents, like = [self.node(inputs[i]) for i in at], [_like(inputs[i]) for i in at]

        def pull(gs: tuple) -> list:
            back = vjp(list(gs))
            return [back[i] for i in at]

        node = Node([(parents, pull, like)] if at else [], len(outputs), name)
        attached = []
        for i, x in enumerate(outputs):
            if isinstance(x, torch.Tensor):
                with self.paused():
                    x = torch.ops.aten.alias.default(x)  # an output may be an input, which has its own place
                if at and differentiable(x):
                    x.__dict__[self.key] = (node, i)
            attached.append(x)
        return attached

    def _descend(self, func: Callable, args: tuple, kwargs: dict) -> Any:
        found = find_definition(func)
        if found is None:
            out = func(*args, **kwargs)
            if any(differentiable(r) for r in (out if isinstance(out, (tuple, list)) else (out,))):
                raise missing_rule(func)
            return out
        return descend(self, func, found, args, kwargs)

    def node(self, x: Any) -> tuple[Node, int] | None:
        """Where on the tape `x` was made; None if it doesn't depend on a watched tensor."""
        return x.__dict__.get(self.key) if isinstance(x, torch.Tensor) else None

    def pull(
        self, outputs: Sequence[Any], cotangents: Sequence[Any], inputs: Sequence[torch.Tensor], keep: bool = False
    ) -> list[torch.Tensor | None]:
        """Cotangents of `inputs` (watched, or computed from those; None is left out), given those of the `outputs`; None
        where nothing arrives. The tape is consumed unless `keep`."""
        pending: dict[Node, list] = {}
        heap: list[tuple[int, Node]] = []  # the latest first

        def arrive(at: tuple[Node, int], g: torch.Tensor) -> None:
            node, index = at
            slots = pending.get(node)
            if slots is None:
                slots = pending[node] = [None] * (node.results or 1)
                heapq.heappush(heap, (-node.order, node))
            slots[index] = g if slots[index] is None else _added(slots, index, g)

        for out, g in zip(outputs, cotangents):
            at = self.node(out)
            if at is not None and g is not None:
                arrive(at, g)
        del cotangents
        wanted: dict[Node, list[tuple[int, int]]] = {}
        for i, x in enumerate(inputs):
            if x is None:
                continue
            node, index = self.node(x)
            wanted.setdefault(node, []).append((i, index))
        found: list[torch.Tensor | None] = [None] * len(inputs)
        while heap:
            node = heapq.heappop(heap)[1]
            slots = pending.pop(node)
            for i, index in wanted.get(node, ()):
                found[i] = slots[index]
            if node.edges == []:  # a watched input
                continue
            if node.edges is None:
                raise DifferentiationError(
                    "this pullback has been used already and its tape freed. Ask for it with nf.vjp, whose pullback "
                    "may be called any number of times."
                )
            g = slots[0] if node.results is None else tuple(slots)
            slots = None
            edges = node.edges
            if not keep:
                node.edges = None
            with source.attributed(node.source, f"vjp of {op_name(node.op)}") if source.capturing else _NOTHING:
                while edges:
                    parent, vjp, like = edges[-1]
                    edges = edges[:-1]
                    back = vjp(g)
                    if not edges:
                        g = None
                    if isinstance(parent, list):
                        for p, b, k in zip(parent, back, like):
                            if p is not None and b is not None:
                                arrive(p, fit(b, *k))
                    elif back is not None:
                        arrive(parent, fit(back, *like))
                    vjp = back = None
        return found


def _added(slots: list, index: int, g: torch.Tensor) -> torch.Tensor:
    """slots[index] + g; in place where nobody else can see it: a cotangent that is nothing but this sum, in eager code."""
    total = slots[index]
    if (
        not torch._C._len_torch_dispatch_stack()
        and sys.getrefcount(total) == 3  # in `slots`, here, and as getrefcount's argument
        and total._use_count() == 1
        and torch._C._storage_Use_Count(total.untyped_storage()._cdata) == 2  # and the object made for asking
        and total.is_contiguous()
        and total.shape == g.shape
        and total.dtype == g.dtype
    ):
        return total.add_(g)
    return total + g


def differentiable(x: Any) -> bool:
    """May `x` have a derivative: is it a tensor of real or complex numbers?"""
    return isinstance(x, torch.Tensor) and (x.dtype.is_floating_point or x.dtype.is_complex)


def fit(g: torch.Tensor, shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
    """A cotangent in its argument's shape and dtype: undo broadcasting and type promotion."""
    if g.shape != shape:
        lead = g.dim() - len(shape)
        dims = [*range(lead), *(lead + i for i, n in enumerate(shape) if n == 1 and g.shape[lead + i] != 1)]
        g = g.sum(dims, keepdim=True) if dims else g
        g = g.reshape(shape) if g.shape != shape else g
    if g.dtype != dtype:
        g = torch.real(g).to(dtype) if g.is_complex() and not dtype.is_complex else g.to(dtype)
    return g


def descend(tracer: Tracer, func: Any, definition: Callable, args: tuple, kwargs: dict) -> Any:
    """Apply an operator's definition under `tracer`. PyTorch's definitions of some operators lead back to themselves
    (through `torch._prims`); those have none."""
    if tracer.descents.count(func) > 2:
        raise missing_rule(func)
    tracer.descents.append(func)
    try:
        with tracer, numbers_only():
            return definition(*args, **kwargs)
    finally:
        tracer.descents.pop()


def missing_rule(func: Any) -> DifferentiationError:
    name = op_name(func)
    short = name.removeprefix("aten.").replace(".", "::", 1) if not name.startswith("aten.") else name[5:]
    if short.startswith("neuralforge_user::"):
        return DifferentiationError(
            f"{source.user_line()}: {name}, made by nf.opaque, has neither a derivative rule nor a definition. Wrap the call in "
            f"nf.custom_vjp or nf.custom_jvp, which give it one; for second derivatives let the rule's fwd call the wrapped "
            f"function, and wrap what its bwd calls too."
        )
    return DifferentiationError(
        f"{source.user_line()}: {name} has neither a derivative rule nor a definition in simpler operators. Write one "
        f'with `from neuralforge.autograd.rules import rule, linear, diagonal`: @rule("{short}") on a function of the '
        f"result and the arguments that returns a derivative for each argument; or wrap the call in nf.custom_vjp."
    )


def _parents(a: Any, key: str) -> Any:
    """The place on the tape of an argument: a pair, None, or a list of them for a list with any tracked tensor."""
    if isinstance(a, torch.Tensor):
        return a.__dict__.get(key)
    if isinstance(a, (list, tuple)):
        found = [x.__dict__.get(key) if isinstance(x, torch.Tensor) else None for x in a]
        return found if any(found) else None
    return None


def _edges(func: Any, derivatives: Any, args: tuple, parents: list) -> list[tuple]:
    """The edges from a new node to the tracked among its arguments."""
    if isinstance(derivatives, Joint):
        wanted = tuple(bool(p) for p in parents)
        at = [i for i, w in enumerate(wanted) if w]
        pull = derivatives.vjp

        def vjp(g: Any) -> list:
            back = pull(g if isinstance(g, tuple) else (g,), wanted)
            return [back[i] for i in at]

        return [([parents[i] for i in at], vjp, [_like(args[i]) for i in at])]
    if hasattr(derivatives, "vjp"):
        derivatives = (derivatives,)
    edges = []
    for i, parent in enumerate(parents):
        if not parent:
            continue
        if i >= len(derivatives):
            raise DifferentiationError(
                f"{source.user_line()}: the derivative rule of {op_name(func)} covers {len(derivatives)} arguments, "
                f"and argument {i} depends on a differentiated input."
            )
        if derivatives[i] is not None:
            like = [_like(a) for a in args[i]] if isinstance(parent, list) else _like(args[i])
            edges.append((parent, derivatives[i].vjp, like))
    return edges


def _like(x: Any) -> Any:
    return (x.shape, x.dtype) if isinstance(x, torch.Tensor) else None
