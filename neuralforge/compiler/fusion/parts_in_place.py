"""Parts of a concatenation that fused groups make, laid out as the whole is: written into their places (`planning/plan.py`), nothing copies
them. The gradients of a gate and of what it lets through, say, which one product made side by side.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch

from ...graph.ir import Equation, Graph, Value, substitute
from ..passes.dataflow import Dataflow
from ..passes.rewrites import make
from ..space import contiguous, cuts_of, dimension
from ..storage import root_of, view_roots
from .fused import Fused

aten = torch.ops.aten


def parts_in_place(graph: Graph) -> Graph:
    """Concatenations along any dimension but the first, where fused groups make all of the parts, and nobody else reads them."""
    moved: dict[Value, Value] = {}  # parts, with what they are in the whole's memory
    flow, roots = Dataflow(graph), view_roots(graph)
    escaping = {root_of(roots, v) for v in flow.results}
    for eq in graph.equations:
        if eq.op is not aten.cat.default or not contiguous(eq.outputs) or eq.outputs in escaping:
            continue
        whole, parts, dim = eq.outputs, eq.args[0], dimension(eq)
        if len(set(parts)) < len(parts) or all(part.strides == whole.strides for part in parts):
            continue
        if all(_fits(part, whole, dim, flow) for part in parts):
            if make("parts_in_place", eq.source, f"{len(parts)} parts of {tuple(whole.shape)}, made by fused groups"):
                for part in parts:
                    moved[part] = _laid_out(part, whole.strides)
                    if (root := _unstacked(part, flow)) is not part:
                        moved[root] = _laid_out(root, (*whole.strides[:dim], *whole.strides[dim + 1 :]))
    if not moved:
        return graph
    equations = []
    for eq in graph.equations:
        if isinstance(eq.op, Fused) and not moved.keys().isdisjoint(eq.results):
            eq = _with_gaps(eq, moved)
        elif not moved.keys().isdisjoint(eq.inputs):  # the concatenation, or the view that it reads
            eq = replace(eq, args=substitute(eq.args, moved), outputs=substitute(eq.outputs, moved))
        equations.append(eq)
    return graph.replace(equations=equations)


def _fits(part: Value, whole: Value, dim: int, flow: Dataflow) -> bool:
    """Can the group that makes `part`, for the concatenation alone, write it into its place? Whole rows of the group then lie side by
    side."""
    if part in flow.results or len(flow.users[part]) > 1:
        return False
    if (root := _unstacked(part, flow)) is not part:
        return flow.producers[part].args[1] % whole.fake.dim() == dim < whole.fake.dim() - 1 and _fits(root, whole, dim, flow)
    maker = flow.producers.get(part)
    if maker is None or not isinstance(maker.op, Fused) or len(maker.op.parts) != 1:
        return False
    if not contiguous(part) or part.dtype != whole.dtype or part.shape[-1] == 1:
        return False
    layout, side_by_side = maker.op.layouts[0], math.prod(part.shape[dim:])
    result = next(r for r in layout.results if r.value is part)
    whole_rows = side_by_side % (layout.columns or 1) == 0
    return result.kind == "full" and layout.in_order and whole_rows and set(cuts_of(part.shape)) <= set(layout.cuts)


def _unstacked(part: Value, flow: Dataflow) -> Value:
    """What `part` is without the dimension that it got to be put together along."""
    maker = flow.producers.get(part)
    return maker.args[0] if maker is not None and maker.op is aten.unsqueeze.default else part


def _laid_out(v: Value, strides: tuple[int, ...]) -> Value:
    with v.fake.fake_mode:
        return Value(f"{v.name}_part", torch.empty_strided(v.shape, strides, dtype=v.dtype, device=v.device))


def _with_gaps(eq: Equation, moved: dict[Value, Value]) -> Equation:
    """The group with other results in place of those that are `moved`."""
    (part,) = eq.op.parts
    named = [Equation(aten.alias.default, (v,), {}, moved[v], eq.source, "parts_in_place") for v in part.outputs if v in moved]
    part = part.replace(equations=[*part.equations, *named], outputs=substitute(part.outputs, moved))
    return Equation(Fused([part], eq.op.why), eq.args, eq.kwargs, substitute(eq.outputs, moved), eq.source, eq.origin)
