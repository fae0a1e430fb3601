"""Softmax and log-softmax written out."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ...graph.ir import Equation, Value
from .patterns import Match, Program

aten = torch.ops.aten


def softmax_by_hand(program: Program) -> Iterator[Match]:
    """exp(x) / sum(exp(x)), with or without the maximum taken off x before."""
    for eq in program.graph.equations:
        if eq.op is not aten.div.Tensor:
            continue
        exponential = program.producer(eq.args[0], aten.exp.default)
        total = program.producer(eq.args[1], aten.sum.dim_IntList)
        if exponential is None or total is None or program.same(total.args[0]) is not exponential.outputs:
            continue
        dim = _kept(total)
        if dim is not None and eq.outputs.shape == exponential.outputs.shape:
            x = _shifted(program, exponential.args[0], dim)
            yield _row_match(program, eq, x, dim, aten._softmax.default)


def log_softmax_by_hand(program: Program) -> Iterator[Match]:
    """x - logsumexp(x), x - log(sum(exp(x))) and log(softmax(x))."""
    for eq in program.graph.equations:
        if eq.op is aten.log.default:
            inner = program.producer(eq.args[0], aten._softmax.default)
            if inner is not None and not inner.args[2]:
                yield _row_match(program, eq, inner.args[0], inner.args[1], aten._log_softmax.default)
        if eq.op is not aten.sub.Tensor or eq.kwargs or not isinstance(eq.args[1], Value):
            continue
        x = program.same(eq.args[0])
        total = program.producer(eq.args[1], aten.logsumexp.default)
        if total is not None and (dim := _kept(total)) is not None and program.same(total.args[0]) is x:
            yield _row_match(program, eq, x, dim, aten._log_softmax.default)
        log = program.producer(eq.args[1], aten.log.default)
        total = log and program.producer(log.args[0], aten.sum.dim_IntList)
        exponential = total and program.producer(total.args[0], aten.exp.default)
        if exponential and (dim := _kept(total)) is not None and program.same(exponential.args[0]) is x:
            yield _row_match(program, eq, _shifted(program, x, dim), dim, aten._log_softmax.default)


def _kept(reduction: Equation) -> int | None:
    """The one dimension reduced, and kept with size 1."""
    (x, dims, kept) = (*reduction.args, False)[:3]
    return dims[0] % x.fake.dim() if x.shape and len(dims) == 1 and kept and not reduction.kwargs else None


def _shifted(program: Program, x: Value, dim: int) -> Value:
    """x, if this is x - max(x)."""
    eq = program.producer(x, aten.sub.Tensor)
    if eq is None or eq.kwargs or not isinstance(eq.args[1], Value):
        return x
    top = program.producer(eq.args[1], aten.amax.default, aten.max.dim)
    if top is None or len(top.args) < 3 or not top.args[2] or program.same(top.args[0]) is not program.same(eq.args[0]):
        return x
    dims = top.args[1] if isinstance(top.args[1], list) else [top.args[1]]
    return top.args[0] if [d % x.fake.dim() for d in dims] == [dim] else x


def _row_match(program: Program, eq: Equation, x: Value, dim: int, op: torch._ops.OpOverload) -> Match:
    dim %= x.fake.dim()
    replacement = lambda env: [op(env[x], dim, False)]
    return Match(program.between([eq.outputs], {x}), [eq.outputs], replacement, f"along dimension {dim}", (op, dim))
