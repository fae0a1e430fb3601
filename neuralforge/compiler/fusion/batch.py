"""Batching: fused groups of equal structure that don't depend on each other run as one (the multi-tensor kernels of
optimizers, found rather than asked for): one call and one parallel region for all parameters."""

from __future__ import annotations

from ...graph.ir import Equation, Graph, Value
from .codegen import source
from .fused import Fused


def batch(graph: Graph) -> Graph:
    """Join fused equations of equal code. A group moves up to an earlier one if its operands exist by then, or the
    earlier one moves down to it if nobody needs its results before and its operands live that long anyway."""
    position = {eq: i for i, eq in enumerate(graph.equations)}
    made = {v: i for eq, i in position.items() for v in eq.results}
    first_use: dict[Value, int] = {}
    last_use: dict[Value, int] = {}
    for eq, i in position.items():
        for v in eq.inputs:
            first_use.setdefault(v, i)
            last_use[v] = i
    for v in graph.outputs:
        if isinstance(v, Value):
            last_use[v] = len(graph.equations)

    batches: list[tuple[int, list[Equation]]] = []
    open_batch: dict[str, int] = {}  # code -> its newest batch
    for eq in graph.equations:
        if not isinstance(eq.op, Fused):
            continue
        code = source(eq.op.layouts[0])
        here = position[eq]
        if code in open_batch:
            at, members = batches[open_batch[code]]
            if all(made.get(v, -1) < at for v in eq.inputs):
                members.append(eq)
                continue
            lives_on = all(
                last_use[v] > here or v not in made or not v.fake.dim() for member in members for v in member.inputs
            )
            if lives_on and all(first_use.get(v, here + 1) > here for member in members for v in member.results):
                batches[open_batch[code]] = here, [*members, eq]
                continue
        open_batch[code] = len(batches)
        batches.append((here, [eq]))

    joined = {eq for _, members in batches for eq in members if len(members) > 1}
    placed = {at: members for at, members in batches if len(members) > 1}
    equations = []
    for i, eq in enumerate(graph.equations):
        if eq not in joined:
            equations.append(eq)
        if i in placed:
            equations.append(_join(placed[i]))
    return graph.replace(equations=equations)


def _join(members: list[Equation]) -> Equation:
    why = f"{len(members)} groups of equal code in one call, the first: {members[0].op.why}"
    op = Fused([part for eq in members for part in eq.op.parts], why)
    op.layouts = [layout for eq in members for layout in eq.op.layouts]
    return op.equation(members[-1].source, "batch")
