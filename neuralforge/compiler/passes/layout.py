"""Transposes folded into the matrix products that make what they transpose."""

from __future__ import annotations

import torch

from ...graph.builder import Builder
from ...graph.ir import Equation, Graph, Value, leaves, substitute

aten = torch.ops.aten


def transpose_products(graph: Graph) -> Graph:
    """(A B)^T, where only the transpose is used, is B^T A^T: the result is then contiguous as it is read. Weight
    gradients come out this way, and everything elementwise after them runs along rows."""
    users = graph.users()
    results = set(leaves(graph.outputs))
    products = {eq.outputs: eq for eq in graph.equations if eq.op is aten.mm.default}
    builder = Builder(graph)
    env: dict[Value, Value] = {}
    try:
        for eq in graph.equations:
            product = products.get(eq.args[0]) if eq.args and is_transpose(eq) else None
            if product is not None and len(users[product.outputs]) == 1 and product.outputs not in results:
                a, b = substitute(product.args, env)
                made = {"source": product.source, "origin": product.origin or "transpose_products"}
                right, left = builder.emit(aten.t.default, b, **made), builder.emit(aten.t.default, a, **made)
                env[eq.outputs] = builder.emit(aten.mm.default, right, left, **made)
            elif any(v in env for v in eq.inputs):
                _follow(eq, env, builder)
            else:
                builder.equations.append(eq)
    except RuntimeError:  # an operator that can't take the new layout, such as a view: leave all as it was
        return graph
    return graph.replace(equations=builder.equations, outputs=substitute(graph.outputs, env))


def _follow(eq: Equation, env: dict[Value, Value], builder: Builder) -> None:
    """Emit an equation whose operands changed layout; the layouts of its results may change in turn."""
    args, kwargs = substitute(eq.args, env), substitute(eq.kwargs, env)
    new = builder.emit(eq.op, *args, source=eq.source, origin=eq.origin, **kwargs)
    if all(old.strides == v.strides for old, v in zip(eq.results, leaves(new))):
        builder.equations[-1] = Equation(eq.op, args, kwargs, eq.outputs, eq.source, eq.origin)
    else:
        env.update(zip(eq.results, leaves(new)))


def is_transpose(eq: Equation) -> bool:
    """Does it swap the two dimensions of a matrix?"""
    if not isinstance(eq.outputs, Value) or eq.outputs.fake.dim() != 2:
        return False
    packet = getattr(eq.op, "overloadpacket", None)
    if packet is aten.t:
        return True
    if packet is aten.transpose:
        return eq.args[1] % 2 != eq.args[2] % 2
    return packet is aten.permute and [d % 2 for d in eq.args[1]] == [1, 0]
