"""Evaluate at compile time what doesn't depend on the inputs."""

from __future__ import annotations

import torch

from ...graph.ir import Equation, Graph, Value, substitute
from ...graph.operators import is_random

aten = torch.ops.aten

LIMIT = 1 << 20
"""Bytes: larger results stay computed at run time, since they would be held for good."""


def fold_constants(graph: Graph) -> Graph:
    """Run the equations that depend on nothing but literals (`torch.arange`, `torch.tensor(2.0)`, masks, rotary
    tables). Tensors that the function closes over are not folded: their owner may change them between calls."""
    known: dict[Value, torch.Tensor] = {}
    folded: dict[Value, torch.Tensor] = {}
    kept: list[Equation] = []
    for eq in graph.equations:
        literal = eq.op is aten.lift_fresh.default and eq.args[0] in graph.constants
        ready = literal or all(v in known for v in eq.inputs)
        if not ready or is_random(eq.op) or "empty" in eq.name or sum(v.nbytes for v in eq.results) > LIMIT:
            kept.append(eq)
            continue
        env = {**graph.constants, **known} if literal else known
        with torch.no_grad():
            result = eq.op(*substitute(eq.args, env), **substitute(eq.kwargs, env))
        for value, tensor in zip(eq.results, result if isinstance(result, (tuple, list)) else [result]):
            known[value] = tensor
    needed = {v for eq in kept for v in eq.inputs if v in known}
    uniform = {eq.outputs for eq in graph.equations if eq.op is aten.full.default} & needed
    # One number all over is cheaper to make again, within a fused group, than to read.
    stays = {*kept, *(eq for eq in graph.equations if isinstance(eq.outputs, Value) and eq.outputs in uniform)}
    kept = [eq for eq in graph.equations if eq in stays]
    known = {v: t for v, t in known.items() if v not in uniform}
    for eq in kept:
        folded.update((v, known[v]) for v in eq.inputs if v in known)
    folded.update((v, known[v]) for v in graph.outputs if isinstance(v, Value) and v in known)
    return graph.replace(equations=kept, constants={**graph.constants, **folded})
