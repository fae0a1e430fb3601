"""Evaluate at compile time what doesn't depend on the inputs."""

from __future__ import annotations

import torch

from ...graph.ir import Equation, Graph, Value
from ...graph.literals import Literals

aten = torch.ops.aten

LIMIT = 1 << 20
"""Bytes: larger results stay computed at run time, since they would be held for good."""


def fold_constants(graph: Graph) -> Graph:
    """Run the equations that depend on nothing but literals (`torch.arange`, `torch.tensor(2.0)`, masks, rotary
    tables). Tensors that the function closes over are not folded: their owner may change them between calls."""
    literals = Literals(graph, LIMIT)

    def stays(eq: Equation) -> bool:
        # One number all over is cheaper to make again, within a fused group, than to read.
        return eq.op is aten.full.default or any(literals(v) is None for v in eq.results)

    kept = [eq for eq in graph.equations if stays(eq)]
    made = {v for eq in kept for v in eq.results}
    read = [v for eq in kept for v in eq.inputs] + [v for v in graph.outputs if isinstance(v, Value)]
    folded = {v: literals(v) for v in read if v in literals.producers and v not in made}
    return graph.replace(equations=kept, constants={**graph.constants, **folded})
