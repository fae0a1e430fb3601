"""Rematerialisation: compute some values again, just before they are needed, so that a call fits a memory budget.

The peak that is brought down is that of the memory plan of the very schedule that will run, not a proxy. Step by step,
the value is chosen that frees the most memory at the peak for each second of computing it again; the sequence of
steps doesn't depend on the budget, which only says where to stop, so a smaller budget never gives a larger peak.
Random operators are never run again: what they drew is kept, so dropout is the same. A part of a fused group may round
in other places than the whole: results are the same up to that.
"""

from __future__ import annotations

import itertools
import math
from bisect import bisect_left
from dataclasses import dataclass

from ...errors import MemoryBudgetError
from ...graph import Graph, verify
from ...graph.ir import Equation, Value, map_tree, substitute
from ...graph.operators import has_effect
from ..fusion.fused import Fused
from ..kernels import Kernel, fused_kernel
from ..storage import is_view, root_of
from .again import results_apart
from .cost import additions, cost
from .plan import Plan, plan_memory

FLOPS, BANDWIDTH = 2e11, 2e10
"""Rough rates that weigh arithmetic against memory traffic."""
CALL = 1e-5
"""Seconds that a call takes before any work."""
FRUGAL = 0.015
"""Share of a program's time that may go to saving memory without being asked."""
WORTH = 2e9
"""Bytes that must become free for each second of it."""
CHAIN = 2
"""Equations that may run again only to make what another one that does reads, and what is gone by then."""
PATIENCE = 20
"""Steps that may follow each other without a lower peak before it counts as the lowest."""


@dataclass
class Step:
    """Run `equations` again, in their order, before the equation at `at`, for the `values` of the last one."""

    equations: list[Equation]
    values: list[Value]
    at: int
    seconds: float
    score: float


def rematerialise(
    graph: Graph, kernels: dict[Equation, Kernel], donated: list[Value], budget: int | None
) -> tuple[Graph, dict[Equation, Kernel]]:
    """A graph of the same results whose planned peak is at most `budget` bytes, and its kernels, of which those of parts of
    groups that run again aren't built yet (`built`); without a budget, as low as recomputing for `FRUGAL` of the program's
    time brings it. `kernels` and `donated` are what the memory plan depends on. Raises MemoryBudgetError, telling the smallest budget that can be met."""
    search = _Search(graph, kernels, donated)
    if budget is None:
        search.save_what_is_cheap()
    else:
        search.fit(budget)
    return search.graph, search.kernels


class _Search:
    """The graph in the making, its kernels and its plan."""

    def __init__(self, graph: Graph, kernels: dict[Equation, Kernel], donated: list[Value]):
        self.graph, self.kernels, self.donated = graph, dict(kernels), donated
        self.names = itertools.count()
        self.tried: set[Value] = set()
        self.apart: dict[Equation, list[Equation]] = {}
        self.known_seconds: dict[Equation, float] = {}
        self.plan = self._planned(graph)

    def _planned(self, graph: Graph) -> Plan:
        return plan_memory(graph, self.kernels, self.donated)

    def fit(self, budget: int) -> None:
        """Step by step, until the peak is within the budget."""
        first = smallest = self.plan.peak_bytes
        patience = 0
        while self.plan.peak_bytes > budget:
            steps = self._best_steps(fused_only=False)
            if not steps or patience > PATIENCE:
                mb = lambda n: f"{math.ceil(n / 1e5) / 10:.1f} MB"
                lower = f"from {mb(first)} down to {mb(smallest)} at best" if smallest < first else f"of {mb(first)} no lower"
                raise MemoryBudgetError(
                    f"memory_budget={budget / 1e6:.1f} MB can't be met: recomputing brings the peak of this program {lower}. Allow at "
                    f"least memory_budget={smallest}, or make the batch smaller."
                )
            self.tried.update(steps[0].values)
            self.graph = verify(self._applied(self.graph, steps[0]))
            self.plan = self._planned(self.graph)
            patience = 0 if self.plan.peak_bytes < smallest else patience + 1
            smallest = min(smallest, self.plan.peak_bytes)

    def save_what_is_cheap(self) -> None:
        """Recompute fused groups while that is next to free and brings the peak down."""
        seconds = FRUGAL * sum(self._seconds(eq) for eq in self.graph.equations)
        while steps := self._best_steps(fused_only=True):
            chosen = []
            for step in steps:
                if step.seconds <= seconds and step.score > WORTH and self.tried.isdisjoint(step.values):
                    self.tried.update(step.values)
                    chosen.append(step)
                    seconds -= step.seconds
            if not chosen:
                break
            trial = self.graph
            for step in sorted(chosen, key=lambda step: -step.at):
                trial = self._applied(trial, step)
            plan = self._planned(verify(trial))
            if plan.peak_bytes < self.plan.peak_bytes:
                self.graph, self.plan = trial, plan

    def _candidates(self, eq: Equation) -> list[Equation]:
        """The equation, and what makes single ones of its results."""
        if eq not in self.apart:
            self.apart[eq] = results_apart(eq)
            if eq in self.kernels:
                self.kernels |= {part: fused_kernel(part.op) for part in self.apart[eq]}
        return [eq, *self.apart[eq]]

    def _best_steps(self, fused_only: bool) -> list[Step]:
        """At the moment of the highest use, the step with the best score and those that are as good; where none helps
        there, at the next highest."""
        plan = self.plan
        uses: dict[Value, list[int]] = {}
        for i, eq in enumerate(self.graph.equations):
            for v in {root_of(plan.roots, v) for v in eq.inputs}:
                uses.setdefault(v, []).append(i)
        # What may run again only for others that do.
        makers = {} if fused_only else self.graph.producers()
        able = [
            (i, candidate)
            for i, eq in enumerate(self.graph.equations)
            if eq.origin != "recomputed" and not is_view(eq) and not has_effect(eq.op, eq.args, eq.kwargs)
            for candidate in self._candidates(eq)
            if isinstance(candidate.op, Fused) or not fused_only
        ]
        for moment in sorted(range(len(plan.in_use)), key=lambda i: -plan.in_use[i])[:8]:
            steps = [step for i, eq in able if i < moment and (step := self._step(eq, moment, uses, makers)) is not None]
            if steps:
                best = max(step.score for step in steps)
                return sorted((step for step in steps if step.score > 0.9 * best), key=lambda step: -step.score)
        return []

    def _step(
        self, eq: Equation, moment: int, uses: dict[Value, list[int]], makers: dict[Value, Equation]
    ) -> Step | None:
        """Dropping, at `moment`, what `eq` computed before, and computing it again for the next reader."""
        plan, waiting = self.plan, []
        for v in eq.results:
            if v in self.tried or v in plan.roots or plan.death[v] <= moment:
                continue
            readers = uses.get(v, [])
            after = bisect_left(readers, moment)
            if after == len(readers) or readers[after] == moment or plan.death[v] > readers[-1]:
                continue  # leaves the graph, or is read just now
            waiting.append((v, readers[after]))
        if not waiting:
            return None
        at = min(reader for _, reader in waiting)
        freed, best = sum(v.nbytes for v, _ in waiting), None
        for most in range(CHAIN + 1 if makers else 1):
            equations, kept = self._chain(eq, moment, makers, most)
            seconds = sum(self._seconds(again) for again in equations if not is_view(again))
            if freed > kept and (best is None or (freed - kept) / seconds > best.score):
                best = Step(equations, [v for v, _ in waiting], at, seconds, (freed - kept) / seconds)
        return best

    def _chain(
        self, eq: Equation, moment: int, makers: dict[Value, Equation], most: int
    ) -> tuple[list[Equation], int]:
        """`eq` with up to `most` of the `makers` before it (and views between them) of what it reads and what is gone at `moment`;
        and the bytes that would have to be kept all the same."""
        chain, kept, plan = [eq], set(), self.plan
        todo = list(eq.inputs)
        for v in todo:  # which grows
            root, maker = root_of(plan.roots, v), makers.get(v)
            if root not in plan.birth or plan.death[root] >= moment:
                continue
            if v is not root and maker is not None:  # a view of what may be made again
                chain.append(maker)
                todo.append(maker.args[0])
            elif most and maker is not None and maker.origin != "recomputed" and not has_effect(maker.op, maker.args, maker.kwargs):
                most -= 1
                chain.append(maker)
                todo += maker.inputs
            else:
                kept.add(root)
        position = {again: plan.birth[again.results[0]] for again in chain}
        return sorted(position, key=position.__getitem__), sum(root.nbytes for root in kept)

    def _seconds(self, eq: Equation) -> float:
        if eq not in self.known_seconds:
            self.known_seconds[eq] = _seconds(eq)
        return self.known_seconds[eq]

    def _applied(self, graph: Graph, step: Step) -> Graph:
        env: dict[Value, Value] = {}
        roots = self.plan.roots

        def again(eq: Equation) -> Equation:
            renew = lambda v: Value(f"{v.name}_r{next(self.names)}", v.fake) if isinstance(v, Value) else v
            outputs = map_tree(renew, eq.outputs)
            new = Equation(eq.op, substitute(eq.args, env), substitute(eq.kwargs, env), outputs, eq.source, "recomputed")
            env.update(zip(eq.results, new.results))
            return self._like(eq, new)

        before, after = graph.equations[: step.at], graph.equations[step.at :]
        inserted = [again(eq) for eq in step.equations]
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
                eq = self._like(eq, new)
            rest.append(eq)
        return graph.replace(equations=[*before, *inserted, *rest])

    def _like(self, old: Equation, new: Equation) -> Equation:
        if old in self.kernels:
            self.kernels[new] = self.kernels[old]
        return new


def _seconds(eq: Equation) -> float:
    c = cost(eq)
    if isinstance(eq.op, Fused):
        return max(additions(eq.op.graph) / (FLOPS / 2), c.bytes / BANDWIDTH) + CALL
    return c.flops / FLOPS + c.bytes / BANDWIDTH + CALL
