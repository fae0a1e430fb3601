"""Gradients of attention that are concatenated, written where the concatenation will be.

Queries, keys and values mostly come from one product, which is split; so their gradients are put together again. The
kernel writes with any strides: its results get those of their places in the whole, and then the memory plan puts them
there and nothing is left to copy (`plan.py`).
"""

from __future__ import annotations

import torch

from ...graph.builder import Builder
from ...graph.ir import Equation, Graph, Value, substitute
from ..attention import claim_attention
from .layout import follow
from .patterns import Program
from .simplify import dead_code
from .views import arrange, inverse, natural

aten, own = torch.ops.aten, torch.ops.neuralforge
_BACKWARD = (aten._scaled_dot_product_flash_attention_for_cpu_backward.default, own.flash_attention_backward.default)


def concatenate_stacks(graph: Graph) -> Graph:
    """A stack, or its copy with the dimensions in another order, as the concatenation of views of its parts: one copy less,
    and none where parts can be written into their places."""
    if not any(eq.op is aten.stack.default for eq in graph.equations):
        return graph
    builder, program, copies = Builder(graph), Program(graph), {}
    for eq in graph.equations:
        copied = eq.op is aten.clone.default and eq.kwargs.get("memory_format") is torch.contiguous_format
        if copied and program.users[eq.args[0]] == [eq] and eq.args[0] not in program.results:
            root, dims = program.root(eq.args[0], eq)
            stack = program.producers.get(root)
            whole = natural(root.shape)
            if stack is not None and stack.op is aten.stack.default and 1 not in root.shape and sorted(dims) == sorted(whole):
                if root not in program.results and len(program.users[root]) == 1:
                    copies[eq] = stack, [whole.index(dim) for dim in dims]
    gone = {stack for stack, _ in copies.values()}
    for eq in graph.equations:
        if eq in copies or eq.op is aten.stack.default and eq not in gone:
            stack, order = copies.get(eq) or (eq, list(range(eq.outputs.fake.dim())))
            made = {"source": stack.source, "origin": stack.origin or "concatenate_stacks"}
            axis = (*stack.args, 0)[1] % len(order)
            within, parts = [d - (d > axis) for d in order if d != axis], []
            for part in stack.args[0]:
                part = builder.emit(aten.permute.default, part, within, **made) if within != sorted(within) else part
                parts.append(builder.emit(aten.unsqueeze.default, part, order.index(axis), **made))
            args = parts, order.index(axis)
            builder.equations.append(Equation(aten.cat.default, args, {}, eq.outputs, stack.source, made["origin"]))
        elif eq not in gone:
            builder.equations.append(eq)
    return dead_code(graph.replace(equations=builder.equations))


def attention_side_by_side(graph: Graph) -> Graph:
    """Give the gradients of attention that are only concatenated the strides of their places."""
    cats = [eq for eq in graph.equations if eq.op is aten.cat.default]
    if not cats:
        return graph
    program = Program(graph)
    found = {v: placed for eq in cats for v, placed in _places(program, eq).items()}
    if not found:
        return graph
    builder, env = Builder(graph), {}
    try:
        for eq in graph.equations:
            if any(v in found for v in eq.results):
                args, kwargs = substitute(eq.args, env), substitute(eq.kwargs, env)
                outputs = tuple(found.get(v, v) for v in eq.results)
                builder.equations.append(Equation(eq.op, args, kwargs, outputs, eq.source, eq.origin))
                env.update((v, found[v]) for v in eq.results if v in found)
            else:
                follow(eq, env, builder)
    except (RuntimeError, ValueError):  # an operator that can't take the new layout: leave all as it was
        return graph
    return graph.replace(equations=builder.equations, outputs=substitute(graph.outputs, env))


def _places(program: Program, cat: Equation) -> dict[Value, Value]:
    """For what is concatenated, if all of it is gradients of attention, values with the strides of their places."""
    whole, found, at = cat.outputs, {}, 0
    dim = (*cat.args, 0)[1] % whole.fake.dim()
    for part in cat.args[0]:
        root, dims = program.root(part, cat)
        maker, back = program.producers.get(root), inverse(dims, tuple(root.shape))
        alone = root not in program.results and len(program.users[root]) == 1 and root not in found
        if maker is None or maker.op not in _BACKWARD or back is None or not alone or claim_attention(maker) is None:
            return {}
        with whole.fake.fake_mode:
            try:
                place = arrange(whole.fake.narrow(dim, at, part.shape[dim]), back)
            except RuntimeError:  # no strides can express it
                return {}
            if place.stride(-1) != 1:
                return {}
            found[root] = Value(f"{root.name}_in_{whole.name}", torch.empty_strided(place.shape, place.stride(), dtype=place.dtype))
        at += part.shape[dim]
    return found
