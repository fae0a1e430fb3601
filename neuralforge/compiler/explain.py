"""`nf.explain`: the program before and after each pass, with what it costs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..graph import Graph, capture
from .compiled import Compiled
from .cost import cost, total
from .jit import Jit
from .pipeline import stages
from .plan import Plan


class Explanation:
    """`print` it for the table of passes, the costliest equations and the memory plan; `stages` holds the name and
    graph after each pass ("captured" first), `program` the generated Python."""

    def __init__(self, f: Callable, args: tuple, kwargs: dict):
        jitted = f if isinstance(f, Jit) else Jit(f, ())
        captured = capture(lambda a, k: jitted.f(*a, **k), args, kwargs)
        self.stages: list[tuple[str, Graph]] = [("captured", captured.graph), *stages(captured.graph)]
        self._compiled: Compiled = jitted.compile(args, kwargs, captured)
        self.program: str = self._compiled.program.source

    @property
    def graph(self) -> Graph:
        """The graph that runs."""
        return self._compiled.graph

    @property
    def plan(self) -> Plan:
        """Its memory plan."""
        return self._compiled.program.plan

    def __str__(self) -> str:
        lines = [f"{'pass':<26}{'equations':>10}{'GFLOP':>10}{'MB moved':>10}"]
        for name, graph in self.stages:
            c = total(graph)
            lines.append(f"{name:<26}{len(graph.equations):>10}{c.flops / 1e9:>10.3f}{c.bytes / 1e6:>10.1f}")
        plan = self.plan
        lines += [
            "",
            f"memory: an arena of {plan.arena_bytes / 1e6:.1f} MB for {len(set(plan.buffers.values()))} buffers, "
            f"{len(plan.fresh)} results in memory of their own, {len(plan.takes_over)} in that of donated arguments; "
            f"predicted peak {plan.peak_bytes / 1e6:.1f} MB",
            "",
            "the costliest equations (operations per byte moved: arithmetic intensity)",
        ]
        ranked = sorted(self.graph.equations, key=lambda eq: -max(cost(eq).flops / 50, cost(eq).bytes))
        for eq in ranked[:12]:
            c = cost(eq)
            lines.append(f"{c.flops / 1e9:>9.3f} GFLOP {c.bytes / 1e6:>8.1f} MB {c.flops / max(c.bytes, 1):>7.1f}  {eq!r}")
        return "\n".join(lines)


def explain(f: Callable, *args: Any, **kwargs: Any) -> Explanation:
    """Capture and compile `f(*args, **kwargs)` (a plain or a jitted function) without running it, and tell what each
    pass did, what the equations cost, and how the memory is laid out."""
    return Explanation(f, args, kwargs)
