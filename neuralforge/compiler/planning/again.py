"""One result of a fused group computed again, without the rest of the group: a normalised row from the row and not from
all that was added up to it, an activation from the product that was kept for its derivative."""

from __future__ import annotations

from ...graph.ir import Equation, Graph, Value
from ..fusion.fused import Fused
from ..fusion.group import LOOKED_THROUGH
from ..products.epilogue import Product
from ..products.prologue import Prologued


def results_apart(eq: Equation) -> list[Equation]:
    """For a group of several results, those equations that make one of them from less than the whole group reads or
    runs: from the group's operands and its other results, whichever come first on the way back; and from its operands alone, so that
    several results can go."""
    product = eq.op.product if isinstance(eq.op, Prologued) else eq
    if isinstance(eq.op, Fused):
        parts = eq.op.parts
    elif isinstance(product.op, Product):
        parts = [product.op.part]
    else:
        return []
    outside = dict(zip(eq.op.graph.inputs, eq.args))
    if product is not eq:  # names of the product's within the prologue's
        outside = {v: outside[x] for v, x in zip(product.op.graph.inputs, product.args) if x in outside}
    made = dict(zip((v for part in parts for v in part.outputs), eq.results))
    operands = dict(outside)
    for part in parts:
        for v in part.outputs:
            if _cone(part, v, operands) is None:  # a product that is kept
                operands[v] = made[v]
    found: dict[tuple, Equation] = {}
    for part in parts:
        for v in part.outputs if len(part.outputs) > 1 else ():
            for known in (outside | made, operands):
                cone = _cone(part, v, known)
                if cone is not None and len(cone.equations) < len(part.equations):
                    args = tuple(known[x] for x in cone.inputs)
                    op = Fused([cone], f"computed again from {', '.join(x.name for x in args)}")
                    found.setdefault((made[v], args), Equation(op, args, {}, (made[v],), eq.source, eq.origin))
    return list(found.values())


def _cone(part: Graph, v: Value, outside: dict[Value, Value]) -> Graph | None:
    """The members of the group that `v` needs, back to what is in memory, except where it is read through a view: that
    a kernel does of its own members only. None if one reads what never is in memory."""
    producers = part.producers()
    views = {eq.outputs for eq in part.equations if eq.op in LOOKED_THROUGH}
    members: set[Equation] = set()
    inputs: dict[Value, None] = {}
    waiting = [(v, True)]
    while waiting:
        x, inside = waiting.pop()
        if x in outside and not inside:
            inputs[x] = None
        elif x not in producers:
            return None
        elif producers[x] not in members:
            members.add(producers[x])
            waiting += [(y, x in views) for y in producers[x].inputs]
    equations = [eq for eq in part.equations if eq in members]
    made = {y for eq in equations for y in eq.results}
    return Graph(inputs=[x for x in inputs if x not in made], equations=equations, outputs=[v])
