"""Results that share memory with an argument, or with each other, only where the function's own do."""

from __future__ import annotations

import torch

from ...graph.ir import Equation, Graph, Value
from ..storage import root_of, view_roots

aten = torch.ops.aten


def own_results(graph: Graph, captured: Graph) -> Graph:
    """`graph`, the optimised form of `captured`, with a copy of each result that passes have made share memory: copies that nobody
    within could tell from what they copy were dropped, and equal things are computed once. (Constants are copied for each call
    by the program that runs.)"""
    roots, before = view_roots(graph), view_roots(captured)
    given, given_before = set(graph.inputs), set(captured.inputs)
    seen: dict[Value, Value] = {}
    equations, outputs = list(graph.equations), []
    for v, asked in zip(graph.outputs, captured.outputs):
        if isinstance(v, Value):
            root, meant = root_of(roots, v), root_of(before, asked)
            if seen.setdefault(root, meant) is not meant or root in given and meant not in given_before:
                with v.fake.fake_mode:
                    copy = Value(f"{v.name}_own{len(outputs)}", v.fake.clone())
                equations.append(Equation(aten.clone.default, (v,), {}, copy, origin="own_results"))
                v = copy
        outputs.append(v)
    return graph.replace(equations=equations, outputs=outputs)
