"""Transposes folded into the matrix products that make what they transpose."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ...graph.builder import Builder
from ...graph.ir import Equation, Graph, Value, leaves, substitute
from ...graph.operators import BY_STORAGE

aten = torch.ops.aten


def transpose_products(graph: Graph) -> Graph:
    """(A B)^T, where only the transpose is used, is B^T A^T: the result is then contiguous as it is read. Weight
    gradients come out this way, and everything elementwise after them runs along rows. The product may be converted to
    another type in between."""
    users = graph.users()
    results = set(leaves(graph.outputs))
    producers = graph.producers()

    def only(v: Value, op: Any) -> Equation | None:
        """The equation that makes `v`, if it is by `op` and the result is used once."""
        eq = producers.get(v)
        return eq if eq is not None and eq.op is op and len(users[v]) == 1 and v not in results else None

    builder = Builder(graph)
    env: dict[Value, Value] = {}
    try:
        for eq in graph.equations:
            copy = only(eq.args[0], aten._to_copy.default) if is_transpose(eq) else None
            product = only(copy.args[0] if copy is not None else eq.args[0], aten.mm.default) if is_transpose(eq) else None
            if product is not None:
                a, b = substitute(product.args, env)
                made = {"source": product.source, "origin": product.origin or "transpose_products"}
                right, left = builder.emit(aten.t.default, b, **made), builder.emit(aten.t.default, a, **made)
                new = builder.emit(aten.mm.default, right, left, **made)
                if copy is not None:
                    made = {"source": copy.source, "origin": copy.origin or "transpose_products"}
                    new = builder.emit(aten._to_copy.default, new, **made, **copy.kwargs)
                env[eq.outputs] = new
            else:
                follow(eq, env, builder)
    except (RuntimeError, ValueError):  # an operator that can't take the new layout: leave all as it was
        return graph
    return graph.replace(equations=builder.equations, outputs=substitute(graph.outputs, env))


def follow(eq: Equation, env: dict[Value, Value], builder: Builder) -> None:
    """Emit an equation whose operands may have been replaced, by others of other layouts; the layouts of its results
    may change in turn, and `env` learns of those."""
    if not any(v in env for v in eq.inputs):
        builder.equations.append(eq)
        return
    args, kwargs = substitute(eq.args, env), substitute(eq.kwargs, env)
    made = {"source": eq.source, "origin": eq.origin}
    if getattr(eq.op, "overloadpacket", None) in BY_STORAGE and args[0].strides != eq.args[0].strides:
        raise RuntimeError(f"{eq.name} depends on the layout of its operand")
    new = emit(builder, eq.op, *args, **made, **kwargs)
    if all(old.strides == v.strides for old, v in zip(eq.results, leaves(new))):
        last = builder.equations[-1]
        builder.equations[-1] = Equation(last.op, last.args, kwargs, eq.outputs, eq.source, eq.origin)
    else:
        env.update(zip(eq.results, leaves(new)))


def emit(builder: Builder, op: Callable, *args: Any, **kwargs: Any) -> Any:
    """`builder.emit`, of operands that may be laid out otherwise than once: what can't be viewed is copied."""
    try:
        return builder.emit(op, *args, **kwargs)
    except (RuntimeError, ValueError):
        if op not in (aten.view.default, aten._unsafe_view.default):
            raise
        made = {name: kwargs[name] for name in ("source", "origin")}
        copy = builder.emit(aten.clone.default, args[0], memory_format=torch.contiguous_format, **made)
        return builder.emit(aten.view.default, copy, *args[1:], **made)


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
