"""From a captured function to a program that runs it."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._pytree import TreeSpec, tree_unflatten

from ..graph import Captured
from ..graph.ir import Equation
from .executor import Program
from .kernels import claim
from .pipeline import optimise
from .plan import plan_memory
from .products import choose_products
from .remat import rematerialise


class Compiled:
    """A captured function with its optimised graph and its program."""

    def __init__(self, captured: Captured, donated: list[int], memory_budget: int | None):
        graph = optimise(captured.graph)
        self.out_tree: TreeSpec = captured.out_tree
        self.writes = captured.writes
        # What the function itself writes to can't be given away.
        self.donated = [i for i in donated if i not in captured.writes]
        calls = choose_products(graph.equations)
        kernels = {eq: kernel for eq, kernel in claim(graph).items() if eq not in calls}
        given = [graph.inputs[i] for i in self.donated]
        if memory_budget is not None:

            def copied(old: Equation, new: Equation) -> None:
                for table in (kernels, calls):
                    if old in table:
                        table[new] = table[old]

            graph = rematerialise(graph, lambda g: plan_memory(g, kernels, given), copied, memory_budget)
        self.graph = graph
        self.program = Program(graph, kernels, calls, given)

    def __call__(self, tensors: list[torch.Tensor]) -> Any:
        given = tensors
        if self.donated and _overlapping(tensors, self.donated):
            given = list(tensors)
            for i in self.donated:
                given[i] = tensors[i].clone(memory_format=torch.preserve_format)
        flat = self.program(*given)
        count = len(flat) - len(self.writes)
        for i, new in zip(self.writes, flat[count:]):
            with torch.no_grad():
                tensors[i].copy_(new)
        return tree_unflatten(flat[:count], self.out_tree)


def _overlapping(tensors: list[torch.Tensor], donated: list[int]) -> bool:
    """Does a donated tensor share its memory with another argument?"""
    seen = [t.untyped_storage().data_ptr() for t in tensors]
    count: dict[int, int] = {}
    for pointer in seen:
        count[pointer] = count.get(pointer, 0) + 1
    return any(count[seen[i]] > 1 and tensors[i].numel() for i in donated)
