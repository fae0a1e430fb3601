"""Attention reads and writes with any strides, so that copies of its operands and results are left out.

Queries, keys and values mostly come from one product, which is split, and their gradients are put together again; heads are
taken apart, and put together. The kernel reads its operands where they are, and its results get the strides of their places
in what is made of them: a concatenation, where the memory plan then puts them (`planning/plan.py`), or a copy.
"""

from __future__ import annotations

import torch

from ...graph.builder import Builder
from ...graph.ir import Equation, Graph, Value, substitute
from ..attention import claim_attention
from ..space import dimension
from .dataflow import Dataflow
from .layout import follow
from .simplify import dead_code
from .views import Dims, arrange, inverse

aten, own = torch.ops.aten, torch.ops.neuralforge
_FORWARD = (aten._scaled_dot_product_flash_attention_for_cpu.default, own.flash_attention.default)
_BACKWARD = (aten._scaled_dot_product_flash_attention_for_cpu_backward.default, own.flash_attention_backward.default)


def attention_reads_in_place(graph: Graph) -> Graph:
    """Operands that are copies of rows that lie elsewhere, read there."""
    if not any(eq.op in (*_FORWARD, *_BACKWARD) for eq in graph.equations):
        return graph
    graph = _select_before_copying(graph)
    flow, builder = Dataflow(graph), Builder(graph)
    for eq in graph.equations:
        if claim_attention(eq) is not None:  # other kernels lay their results out as the queries are
            there = {v: _there(flow, builder, v, eq) for v in eq.inputs if v.fake.dim() == 4}
            eq = eq.reading({v: new for v, new in there.items() if new is not v})
        builder.equations.append(eq)
    return dead_code(graph.replace(equations=builder.equations))


def _select_before_copying(graph: Graph) -> Graph:
    """Parts of what is copied for their sake only are taken of the original."""
    flow, builder, env = Dataflow(graph), Builder(graph), {}
    try:
        for eq in graph.equations:
            copy = flow.producers.get(eq.args[0]) if eq.op is aten.select.int else None
            if copy is not None and copy.op is aten.clone.default and copy.outputs not in flow.results:
                if all(user.op is aten.select.int for user in flow.users[copy.outputs]):
                    eq = eq.reading({copy.outputs: copy.args[0]})
                    env.setdefault(copy.args[0], copy.args[0])
            follow(eq, env, builder)
    except (RuntimeError, ValueError):  # an operator that can't take the new layout: leave all as it was
        return graph
    return dead_code(graph.replace(equations=builder.equations, outputs=substitute(graph.outputs, env)))


def _there(flow: Dataflow, builder: Builder, v: Value, reader: Equation) -> Value:
    """A view of what `v` is a copy of, if rows lie in one piece there; else `v`."""
    root, dims = flow.trace(v)
    copied = any(eq.op is aten.clone.default for eq in flow.between([v], {root}))
    if not copied or root.dtype != v.dtype:
        return v
    place = _strided(root.fake, dims)
    return v if place is None else builder.inline(lambda x: arrange(x, dims), root, source=reader.source, origin="attention_reads_in_place")


def _strided(x: torch.Tensor, dims: Dims) -> torch.Tensor | None:
    """A view of `x` with contiguous rows; None where it takes a copy."""
    with x.fake_mode:
        y = arrange(x, dims)
    return y if y.untyped_storage()._cdata == x.untyped_storage()._cdata and y.stride(-1) == 1 else None


def attention_writes_in_place(graph: Graph) -> Graph:
    """Give attention's results that are only concatenated, or copied, the strides of their places."""
    flow = Dataflow(graph)
    found: dict[Value, Value] = {}
    views: dict[Equation, list[tuple[Value, Dims]]] = {}  # what a concatenation or a copy reads, as views of such results
    for eq in reversed(graph.equations):  # the last copy of several
        parts = _parts(flow, eq)
        placed = [_place(flow, root, dims, whole) for root, dims, whole in parts]
        roots = [root for root, _, _ in parts]
        if parts and None not in placed and found.keys().isdisjoint(roots) and len(set(roots)) == len(roots):
            found.update(zip(roots, placed))
            views[eq] = [(root, dims) for root, dims, _ in parts]
    if not found:
        return graph
    builder, env = Builder(graph), {}
    try:
        for eq in graph.equations:
            if eq in views:
                made = {"source": eq.source, "origin": eq.origin or "attention_writes_in_place"}
                parts = [builder.inline(lambda x, dims=dims: arrange(x, dims), found[root], **made) for root, dims in views[eq]]
                if eq.op is aten.cat.default:
                    args = parts, *eq.args[1:]
                    builder.equations.append(Equation(eq.op, args, {}, eq.outputs, eq.source, eq.origin))
                else:
                    env[eq.outputs] = parts[0]
            elif any(v in found for v in eq.results):
                args, kwargs = substitute(eq.args, env), substitute(eq.kwargs, env)
                outputs = tuple(found.get(v, v) for v in eq.results)
                builder.equations.append(Equation(eq.op, args, kwargs, outputs, eq.source, eq.origin))
                env.update((v, found[v]) for v in eq.results if v in found)
            else:
                follow(eq, env, builder)
    except (RuntimeError, ValueError):  # an operator that can't take the new layout: leave all as it was
        return graph
    return dead_code(graph.replace(equations=builder.equations, outputs=substitute(graph.outputs, env)))


def _parts(flow: Dataflow, eq: Equation) -> list[tuple[Value, Dims, torch.Tensor]]:
    """What a copy, or a concatenation, puts together: of each part its root, as what view of that it is read, and its place."""
    if eq.op is aten.clone.default and eq.outputs.fake.is_contiguous():
        return [(*flow.root(eq.args[0], eq), eq.outputs.fake)]
    if eq.op is not aten.cat.default:
        return []
    parts, at, whole = [], 0, eq.outputs.fake
    dim = dimension(eq)
    for part in eq.args[0]:
        root, dims = flow.root(part, eq)
        if len(flow.users.get(root, ())) > 1 or part.fake.dim() != whole.dim():
            return []
        with whole.fake_mode:
            parts.append((root, dims, whole.narrow(dim, at, part.shape[dim])))
        at += part.shape[dim]
    return parts


def _place(flow: Dataflow, v: Value, dims: Dims, whole: torch.Tensor) -> Value | None:
    """`v`, of which `whole` is the view `dims`, with the strides of that; None if attention doesn't make it, or can't write it so."""
    maker, back = flow.producers.get(v), inverse(dims, tuple(v.shape))
    if maker is None or maker.op not in (*_FORWARD, *_BACKWARD) or v.fake.dim() != 4 or v.dtype != whole.dtype or back is None:
        return None
    place = None if v in flow.results or claim_attention(maker) is None else _strided(whole, back)
    if place is None:
        return None
    with whole.fake_mode:
        return Value(f"{v.name}_in_place", torch.empty_strided(place.shape, place.stride(), dtype=place.dtype))
