"""Operators that fusion doesn't know, as those that it does."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from ...autograd.rules import find_definition
from ...graph import capture
from ...graph.builder import Builder
from ...graph.ir import Equation, Graph, Value, substitute
from ..pointwise import supported
from ..reductions import over_rows, role

aten = torch.ops.aten

DESCENDING = {
    aten.elu, aten.elu_backward, aten.celu, aten.mish, aten.mish_backward, aten.softplus_backward, aten.hardswish,
    aten.hardswish_backward, aten.hardsigmoid, aten.hardsigmoid_backward, aten.hardtanh, aten.hardtanh_backward,
    aten.leaky_relu, aten.leaky_relu_backward, aten.log_sigmoid_forward, aten.log_sigmoid_backward, aten.glu,
    aten.glu_backward, aten.softshrink, aten.softshrink_backward, aten.huber_loss, aten.huber_loss_backward,
    aten.smooth_l1_loss, aten.smooth_l1_loss_backward, aten.binary_cross_entropy,
    aten.binary_cross_entropy_with_logits, aten.binary_cross_entropy_backward, aten.lerp, aten.logit, aten.logit_backward,
}  # fmt: skip
SPREADS = {aten.var.correction, aten.std.correction}


def descend(graph: Graph) -> Graph:
    """Replace these operators by their definitions."""
    builder = Builder(graph)
    env: dict[Value, Any] = {}
    for eq in graph.equations:
        eq = eq.reading(env)
        inside = _inside(eq)
        if inside is None:
            builder.equations.append(eq)
            continue
        out = builder.splice(inside, list(eq.inputs), source=eq.source, origin=eq.origin or "descend")
        env.update(zip(eq.results, out))
    return graph.replace(equations=builder.equations, outputs=substitute(graph.outputs, env))


def _inside(eq: Equation) -> Graph | None:
    if eq.op in SPREADS:
        return _spread(eq) if role(eq) is None else None
    wanted = getattr(eq.op, "overloadpacket", None) in DESCENDING and not supported(eq)
    return _definition(eq) if wanted else None


def _definition(eq: Equation) -> Graph | None:
    """What the operator does to the equation's operands; None if the results would be laid out otherwise."""
    found = find_definition(eq.op)
    if found is None:
        return None

    def call(*tensors: torch.Tensor) -> Any:
        given = dict(zip(eq.inputs, tensors))
        return found(*substitute(eq.args, given), **substitute(eq.kwargs, given))

    return _captured(call, eq)


def _spread(eq: Equation) -> Graph | None:
    """Variances and deviations: of rows as the variance that fused groups know, else by two sums, where PyTorch goes through the numbers
    one by one."""
    x = eq.args[0]
    if not x.shape:
        return None
    dims = [d % x.fake.dim() for d in (*eq.args, None)[1] or range(x.fake.dim())]
    correction, keepdim = eq.kwargs.get("correction"), eq.kwargs.get("keepdim", False)
    correction = 1 if correction is None else correction
    count = math.prod(x.shape[d] for d in dims)
    if x.dtype not in (torch.float32, torch.float64) or count <= correction:
        return None
    rows = over_rows(x, dims, "row") is not None

    def call(x: torch.Tensor) -> torch.Tensor:
        if rows:
            variance = aten.var.correction(x, dims, correction=correction, keepdim=keepdim)
        else:
            variance = (x - x.mean(dims, True)).square().sum(dims, keepdim) / (count - correction)
        return variance.sqrt() if eq.op is aten.std.correction else variance

    return _captured(call, eq)


def _captured(call: Callable, eq: Equation) -> Graph | None:
    inside = capture(call, *(v.fake for v in eq.inputs)).graph
    same = [(v.shape, v.dtype, v.strides) for v in eq.results] == [(v.shape, v.dtype, v.strides) for v in inside.outputs]
    return inside if same and not inside.constants else None
