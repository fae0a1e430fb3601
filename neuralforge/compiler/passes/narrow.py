"""Conversions to float32 in front of a kernel that computes in float32 whatever it reads: it may read what was converted."""

from __future__ import annotations

import torch

from ...graph.ir import Equation, Graph, Value, leaves
from ...kernels import cross_entropy

aten, own = torch.ops.aten, torch.ops.neuralforge
LOGITS = {own.cross_entropy.default: 0, own.cross_entropy_backward.default: 1}
"""Which argument the logits are."""


def narrow_losses(graph: Graph) -> Graph:
    """Cross entropy of logits converted from bfloat16 reads them as they were, and writes their gradient as it is converted
    afterwards: the float32 logits and their gradient, the largest values of a step under autocast, go away."""
    if not any(eq.op in LOGITS for eq in graph.equations):
        return graph
    producers, users, results = graph.producers(), graph.users(), set(leaves(graph.outputs))
    equations, dropped = [], set()
    for eq in graph.equations:
        if eq in dropped:
            continue
        logits = _converted(producers, eq.args[LOGITS[eq.op]]) if eq.op in LOGITS else None
        if logits is None:
            equations.append(eq)
            continue
        outputs = eq.outputs
        if eq.op is own.cross_entropy_backward.default:
            reader = users[outputs][0] if len(users[outputs]) == 1 and outputs not in results else None
            if reader is None or not converts(reader, torch.bfloat16) or reader.outputs.strides != outputs.strides:
                equations.append(eq)
                continue
            outputs = reader.outputs
            dropped.add(reader)
        args = tuple(logits if i == LOGITS[eq.op] else a for i, a in enumerate(eq.args))
        equations.append(Equation(eq.op, args, eq.kwargs, outputs, eq.source, eq.origin or "narrow_losses"))
    return graph.replace(equations=equations)


def converts(eq: Equation, dtype: torch.dtype) -> bool:
    return eq.op is aten._to_copy.default and set(eq.kwargs) == {"dtype"} and eq.kwargs["dtype"] == dtype


def _converted(producers: dict[Value, Equation], v: Value) -> Value | None:
    """The bfloat16 logits of which `v` is the float32 copy, where the kernel serves them."""
    eq = producers.get(v)
    if eq is None or not converts(eq, torch.float32) or eq.args[0].dtype != torch.bfloat16:
        return None
    return eq.args[0] if cross_entropy.native(eq.args[0].fake) else None
