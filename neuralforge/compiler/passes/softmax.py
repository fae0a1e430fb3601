"""Softmax and log-softmax written out."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ...graph.ir import Equation, Value
from .dataflow import Dataflow
from .patterns import Match

aten = torch.ops.aten


def softmax_by_hand(flow: Dataflow) -> Iterator[Match]:
    """exp(x) / sum(exp(x)), with or without the maximum taken off x before."""
    for eq in flow.graph.equations:
        if eq.op is not aten.div.Tensor:
            continue
        exponential = flow.producer(eq.args[0], aten.exp.default)
        total = flow.producer(eq.args[1], aten.sum.dim_IntList)
        if exponential is None or total is None or flow.same(total.args[0]) is not exponential.outputs:
            continue
        dim = _kept(total)
        if dim is not None and eq.outputs.shape == exponential.outputs.shape:
            x = _shifted(flow, exponential.args[0], dim)
            yield from _row_match(flow, eq, x, dim, aten._softmax.default)


def log_softmax_by_hand(flow: Dataflow) -> Iterator[Match]:
    """x - logsumexp(x), x - log(sum(exp(x))) and log(softmax(x))."""
    for eq in flow.graph.equations:
        if eq.op is aten.log.default:
            inner = flow.producer(eq.args[0], aten._softmax.default)
            if inner is not None and not inner.args[2]:
                yield from _row_match(flow, eq, inner.args[0], inner.args[1], aten._log_softmax.default)
        if eq.op is not aten.sub.Tensor or eq.kwargs or not isinstance(eq.args[1], Value):
            continue
        x = flow.same(eq.args[0])
        total = flow.producer(eq.args[1], aten.logsumexp.default)
        if total is not None and (dim := _kept(total)) is not None and flow.same(total.args[0]) is x:
            yield from _row_match(flow, eq, x, dim, aten._log_softmax.default)
        log = flow.producer(eq.args[1], aten.log.default)
        total = log and flow.producer(log.args[0], aten.sum.dim_IntList)
        exponential = total and flow.producer(total.args[0], aten.exp.default)
        if exponential and (dim := _kept(total)) is not None and flow.same(exponential.args[0]) is x:
            yield from _row_match(flow, eq, _shifted(flow, x, dim), dim, aten._log_softmax.default)


def _kept(reduction: Equation) -> int | None:
    """The one dimension reduced, and kept with size 1."""
    (x, dims, kept) = (*reduction.args, False)[:3]
    return dims[0] % x.fake.dim() if x.shape and len(dims) == 1 and kept and not reduction.kwargs else None


def _shifted(flow: Dataflow, x: Value, dim: int) -> Value:
    """x, if this is x - max(x)."""
    eq = flow.producer(x, aten.sub.Tensor)
    if eq is None or eq.kwargs or not isinstance(eq.args[1], Value):
        return x
    top = flow.producer(eq.args[1], aten.amax.default, aten.max.dim)
    if top is None or len(top.args) < 3 or not top.args[2] or flow.same(top.args[0]) is not flow.same(eq.args[0]):
        return x
    dims = top.args[1] if isinstance(top.args[1], list) else [top.args[1]]
    return top.args[0] if [d % x.fake.dim() for d in dims] == [dim] else x


def _row_match(flow: Dataflow, eq: Equation, x: Value, dim: int, op: torch._ops.OpOverload) -> Iterator[Match]:
    """Of floating-point numbers: PyTorch has no softmax of integers or complex numbers, which have exponentials all the same."""
    if x.dtype.is_floating_point:
        dim %= x.fake.dim()
        replacement = lambda env: [op(env[x], dim, False)]
        yield Match(flow.between([eq.outputs], {x}), [eq.outputs], replacement, f"along dimension {dim}", (op, dim))
