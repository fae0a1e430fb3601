"""What an equation costs: floating-point operations and bytes moved, from its types alone."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.utils.flop_counter import flop_registry

from ...graph.ir import Equation, Graph, Value, map_tree
from ..attention import attention_flops
from ..joined import Joined
from ..pointwise import price
from ..storage import is_view

_LOOKUPS = {torch.ops.aten.embedding.default, torch.ops.neuralforge.embedding.default}

_HEADS = {
    torch.ops.neuralforge.linear_cross_entropy.default: (0, 1),
    torch.ops.neuralforge.linear_cross_entropy_with_gradients.default: (1, 3),
}
"""Of fused linear layers and losses, where their matrices are among the arguments, and how many products they make."""


@dataclass(frozen=True)
class Cost:
    flops: int = 0
    bytes: int = 0

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.flops + other.flops, self.bytes + other.bytes)


def cost(eq: Equation) -> Cost:
    """Matrix products and convolutions by PyTorch's own formulas (a multiply and an add are two operations), attention by
    its two products forward and five backward; everything else one operation for each element of its largest operand.
    Views are free; of an embedding only the rows looked up are moved."""
    if is_view(eq):
        return Cost()
    moved = sum(v.nbytes for v in (*dict.fromkeys(eq.inputs), *eq.results))
    if eq.op in _LOOKUPS:
        return Cost(0, eq.args[1].nbytes + 2 * eq.results[0].nbytes)
    attention = attention_flops(eq)
    if attention is not None:
        return Cost(attention, moved)
    if eq.op is torch.ops.neuralforge.matmul.default:
        return Cost(2 * eq.results[0].fake.numel() * eq.args[0].shape[-1], moved)
    if eq.op in _HEADS:
        x, weight = eq.args[_HEADS[eq.op][0] :][:2]
        return Cost(2 * _HEADS[eq.op][1] * x.fake.numel() * weight.shape[0], moved)
    formula = flop_registry.get(getattr(eq.op, "overloadpacket", None))
    if formula is not None:
        shapes = lambda leaf: leaf.fake if isinstance(leaf, Value) else leaf
        out = map_tree(shapes, eq.outputs)
        return Cost(int(formula(*map_tree(shapes, eq.args), **map_tree(shapes, eq.kwargs), out_val=out)), moved)
    if isinstance(eq.op, Joined):
        return Cost(total(eq.op.graph).flops, moved)
    return Cost(max((v.fake.numel() for v in (*eq.inputs, *eq.results)), default=0), moved)


def additions(group: Graph) -> int:
    """How many additions take as long as the arithmetic of a fused group: few of its operations are multiply-adds, and some
    cost many additions."""
    return sum(price(eq) * max((v.fake.numel() for v in eq.results), default=0) for eq in group.equations)


def total(graph: Graph) -> Cost:
    return sum((cost(eq) for eq in graph.equations), Cost())
