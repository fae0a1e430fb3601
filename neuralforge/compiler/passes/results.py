"""Results that share memory with an argument, or with each other, only where the function's own do."""

from __future__ import annotations

import torch

from ...graph.ir import Equation, Graph, Value
from ..plan import is_view, root_of, view_roots

aten = torch.ops.aten


def own_results(graph: Graph, captured: Graph) -> Graph:
    """`graph`, the optimised form of `captured`, with a copy of each result that passes have made share memory: copies that nobody
    within could tell from what they copy were dropped, equal things are computed once, and constants are held for good."""
    roots = view_roots(graph)
    # torch.tensor([1.0]) hands out a new tensor, of which lift_fresh is a view
    before = {v: eq.args[0] for eq in captured.equations if is_view(eq) and eq.op is not aten.lift_fresh.default for v in eq.results}
    held, held_before = {*graph.inputs, *graph.constants}, {*captured.inputs, *captured.constants}
    seen: dict[Value, Value] = {}
    equations, outputs = list(graph.equations), []
    for v, asked in zip(graph.outputs, captured.outputs):
        if isinstance(v, Value):
            root, meant = root_of(roots, v), root_of(before, asked)
            if seen.setdefault(root, meant) is not meant or root in held and meant not in held_before:
                with v.fake.fake_mode:
                    copy = Value(f"{v.name}_own{len(outputs)}", v.fake.clone())
                equations.append(Equation(aten.clone.default, (v,), {}, copy, origin="own_results"))
                v = copy
        outputs.append(v)
    return graph.replace(equations=equations, outputs=outputs)
