"""Rematerialisation: compute some values again, just before they are needed, so that a call fits a memory budget.

The peak that is brought down is that of the memory plan of the very schedule that will run, not a proxy. Step by step,
the value is chosen that frees the most memory at the peak for each second of computing it again; the sequence of
steps doesn't depend on the budget, which only says where to stop, so a smaller budget never gives a larger peak.
Random operators are never run again: what they drew is kept, so dropout is the same.
"""

from __future__ import annotations

import itertools
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass

from ..errors import MemoryBudgetError
from ..graph import Graph, verify
from ..graph.ir import Equation, Value, map_tree, substitute
from .cost import cost
from .passes.simplify import is_random
from .plan import Plan, is_view, root_of

FLOPS, BANDWIDTH = 2e11, 2e10
"""Rough rates that weigh arithmetic against memory traffic; only their ratio matters."""


@dataclass
class Step:
    """Compute `producer` again before equation `at`, for its `values`."""

    producer: Equation
    values: list[Value]
    at: int
    score: float


def rematerialise(
    graph: Graph, plan: Callable[[Graph], Plan], copied: Callable[[Equation, Equation], None], budget: int
) -> Graph:
    """A graph of the same results whose planned peak is at most `budget` bytes.

    `plan` gives the memory plan of a graph; `copied(old, new)` is told of every equation that is to run again. Raises
    MemoryBudgetError, telling the smallest budget that can be met.
    """
    names = itertools.count()
    now = plan(graph)
    first = smallest = now.peak_bytes
    stuck: set[Equation] = set()
    patience = 0
    while now.peak_bytes > budget:
        step = _best_step(graph, now, stuck)
        if step is None or patience > 20:
            raise MemoryBudgetError(
                f"memory_budget={budget / 1e6:.1f} MB can't be met: recomputing brings the peak of this program from "
                f"{first / 1e6:.1f} MB down to {smallest / 1e6:.1f} MB at best. Allow at least that, or make the batch smaller."
            )
        graph = verify(_apply(graph, step, names, copied, now.roots))
        stuck.add(step.producer)
        now = plan(graph)
        patience = 0 if now.peak_bytes < smallest else patience + 1
        smallest = min(smallest, now.peak_bytes)
    return graph


def _best_step(graph: Graph, plan: Plan, stuck: set[Equation]) -> Step | None:
    """The step with the best score at the moment of the highest use; where none helps there, at the next highest."""
    uses: dict[Value, list[int]] = {}
    for i, eq in enumerate(graph.equations):
        for v in {root_of(plan.roots, v) for v in eq.inputs}:
            uses.setdefault(v, []).append(i)
    moments = sorted(range(len(plan.in_use)), key=lambda i: -plan.in_use[i])
    for moment in moments[:8]:
        best: Step | None = None
        for eq in graph.equations[:moment]:
            if eq in stuck or is_view(eq) or is_random(eq.op) or eq.origin == "recomputed":
                continue
            step = _step(eq, moment, plan, uses)
            if step is not None and (best is None or step.score > best.score):
                best = step
        if best is not None:
            return best
    return None


def _step(eq: Equation, moment: int, plan: Plan, uses: dict[Value, list[int]]) -> Step | None:
    """Dropping, at `moment`, what `eq` computed before, and computing it again for the next reader."""
    waiting = []
    for v in eq.results:
        if v not in plan.death or plan.death[v] <= moment or v in plan.roots:
            continue
        readers = uses.get(v, [])
        after = bisect_left(readers, moment)
        if after == len(readers) or readers[after] == moment or plan.death[v] > readers[-1]:
            continue  # leaves the graph, or is read just now
        waiting.append((v, readers[after]))
    if not waiting:
        return None
    at = min(reader for _, reader in waiting)
    freed = sum(v.nbytes for v, _ in waiting)
    for r in {root_of(plan.roots, v) for v in eq.inputs}:
        if r in plan.birth and plan.death[r] < moment:  # would have to be kept instead
            freed -= r.nbytes
    if freed <= 0:
        return None
    c = cost(eq)
    return Step(eq, [v for v, _ in waiting], at, freed / (c.flops / FLOPS + c.bytes / BANDWIDTH + 1e-6))


def _apply(
    graph: Graph, step: Step, names: itertools.count, copied: Callable[[Equation, Equation], None], roots: dict[Value, Value]
) -> Graph:
    env: dict[Value, Value] = {}

    def again(eq: Equation) -> Equation:
        renew = lambda v: Value(f"{v.name}_r{next(names)}", v.fake) if isinstance(v, Value) else v
        outputs = map_tree(renew, eq.outputs)
        new = Equation(eq.op, substitute(eq.args, env), substitute(eq.kwargs, env), outputs, eq.source, "recomputed")
        env.update(zip(eq.results, new.results))
        copied(eq, new)
        return new

    before, after = graph.equations[: step.at], graph.equations[step.at :]
    inserted = [again(step.producer)]
    env = {v: env[v] for v in step.values}
    read_late = {v for eq in after for v in eq.inputs}
    views = [eq for eq in before if is_view(eq) and root_of(roots, eq.results[0]) in step.values]
    needed: set[Value] = set()
    for eq in reversed(views):
        if any(v in read_late or v in needed for v in eq.results):
            needed.update(eq.inputs)
            needed.update(eq.results)
    inserted += [again(eq) for eq in views if eq.results[0] in needed]
    rest = []
    for eq in after:
        if any(v in env for v in eq.inputs):
            new = Equation(eq.op, substitute(eq.args, env), substitute(eq.kwargs, env), eq.outputs, eq.source, eq.origin)
            copied(eq, new)
            eq = new
        rest.append(eq)
    return graph.replace(equations=[*before, *inserted, *rest])
