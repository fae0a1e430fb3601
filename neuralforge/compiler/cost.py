"""What an equation costs: floating-point operations and bytes moved, from its types alone."""

from __future__ import annotations

from dataclasses import dataclass

from torch.utils.flop_counter import flop_registry

from ..graph.ir import Equation, Graph, Value, map_tree
from .plan import is_view


@dataclass(frozen=True)
class Cost:
    flops: int = 0
    bytes: int = 0

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.flops + other.flops, self.bytes + other.bytes)


def cost(eq: Equation) -> Cost:
    """Matrix products, convolutions and attention by PyTorch's own formulas (a multiply and an add are two
    operations); everything else one operation for each element of its largest operand. Views are free."""
    if is_view(eq):
        return Cost()
    moved = sum(v.nbytes for v in (*dict.fromkeys(eq.inputs), *eq.results))
    formula = flop_registry.get(getattr(eq.op, "overloadpacket", None))
    if formula is not None:
        shapes = lambda leaf: leaf.fake if isinstance(leaf, Value) else leaf
        out = map_tree(shapes, eq.outputs)
        return Cost(int(formula(*map_tree(shapes, eq.args), **map_tree(shapes, eq.kwargs), out_val=out)), moved)
    if hasattr(eq.op, "graph"):
        return Cost(total(eq.op.graph).flops, moved)
    return Cost(max((v.fake.numel() for v in (*eq.inputs, *eq.results)), default=0), moved)


def total(graph: Graph) -> Cost:
    return sum((cost(eq) for eq in graph.equations), Cost())
