"""`nf.explain`: the program before and after each pass, and what each of its equations costs, predicted and measured."""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from ..compiler.attention import attention_flops
from ..compiler.buckets import Bucketed
from ..compiler.compiled import Compiled
from ..compiler.fusion.fused import Fused
from ..compiler.jitted import Jit
from ..compiler.joined import Joined
from ..compiler.kernels import destination_kernel
from ..compiler.passes.rewrites import Rewrite, Rewrites
from ..compiler.pipeline import stages
from ..compiler.planning.cost import additions, cost, total
from ..compiler.planning.plan import Plan
from ..compiler.reductions import role
from ..compiler.storage import is_view
from ..errors import KernelError
from ..graph import Graph, capture
from ..graph.ir import Equation
from .peak import arithmetic_peak, bandwidth, product_peak


@dataclass
class Row:
    """One equation of the program that runs: `predicted` and `measured` in seconds."""

    name: str
    source: str
    runs: str
    """What runs it."""
    why: str
    """How the group came about, or why it isn't fused."""
    flops: int
    bytes: int
    predicted: float
    measured: float | None = None

    @property
    def intensity(self) -> float:
        """Operations for each byte moved."""
        return self.flops / max(self.bytes, 1)

    @property
    def seconds(self) -> float:
        """Measured, if it was."""
        return self.predicted if self.measured is None else self.measured


@dataclass
class Stage:
    """A pass, the program after it, and the rewrites it made and refused."""

    name: str
    graph: Graph
    made: list[Rewrite]
    refused: list[Rewrite]


class Explanation:
    """`print` it for the passes, the rewrites, the memory plan and the costliest equations; `page()` is the same and more
    as one HTML page. `measure()` times each equation.

    `passes` holds what each pass did ("captured" first), `rows` what each equation costs, `graph` the program that runs,
    `program` its generated Python, `plan` its memory.
    """

    def __init__(self, f: Callable, args: tuple, kwargs: dict):
        if isinstance(f, Bucketed):
            args, kwargs, _ = f.padded(args, kwargs)
            f = f.jitted
        jitted = f if isinstance(f, Jit) else Jit(f, ())
        captured = capture(lambda a, k: jitted.f(*a, **k), args, kwargs, writes=True)
        self.name = getattr(f, "__name__", type(f).__name__)
        self.passes = [Stage("captured", captured.graph, [], [])]
        rewrites = Rewrites(jitted.max_rewrites)
        made = refused = 0
        for name, graph in stages(captured.graph, rewrites):
            self.passes.append(Stage(name, graph, rewrites.made[made:], rewrites.refused[refused:]))
            made, refused = len(rewrites.made), len(rewrites.refused)
        self._compiled: Compiled = jitted.compile(args, kwargs, captured)
        self.passes.append(Stage("join_products", self._compiled.graph, self._compiled.rewrites, self._compiled.refused))
        self._limited = rewrites.limit is not None and made + len(self._compiled.rewrites) >= rewrites.limit
        self._tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        self.program: str = self._compiled.program.source
        self._rows: dict[Equation, Row] | None = None

    @property
    def stages(self) -> list[tuple[str, Graph]]:
        """Name and graph after each pass."""
        return [(stage.name, stage.graph) for stage in self.passes]

    @property
    def graph(self) -> Graph:
        """The graph that runs."""
        return self._compiled.graph

    @property
    def plan(self) -> Plan:
        """Its memory plan."""
        return self._compiled.program.plan

    @property
    def rows(self) -> list[Row]:
        """The equations of the graph that runs, in its order, without views and other equations with nothing to do."""
        if self._rows is None:
            idle = self.plan.in_place
            self._rows = {eq: self._row(eq) for eq in self.graph.equations if not is_view(eq) and eq not in idle}
        return list(self._rows.values())

    def _row(self, eq: Equation) -> Row:
        c, program = cost(eq), self._compiled.program
        kernel = program.kernels.get(eq)
        if kernel is not None and kernel.library:
            runs = kernel.library
        elif isinstance(eq.op, Fused):
            runs = "fused C" if eq in program.kernels else "its operators one by one"
        else:
            own = kernel is not None and kernel.run.__module__ != destination_kernel.__module__
            runs = "our kernel" if own else "ATen"
        return Row(eq.name, eq.source, runs, why(eq, self._limited), c.flops, c.bytes, predicted(eq))

    def measure(self, rounds: int = 5) -> Explanation:
        """Run the program `rounds` times with a look at the clock around each equation; its best time goes into `rows`.
        Arguments and random state stay as they are. Returns self."""
        program, donated = self._compiled.program, self._compiled.donated
        if any(type(t) not in (torch.Tensor, torch.nn.Parameter) for t in self._tensors):
            raise KernelError("explain: arguments without data can't be run; pass tensors to measure.")
        times = []
        with torch.random.fork_rng(devices=[]):
            for n in range(rounds + 1):
                given = [
                    t.detach().clone() if i in donated else t.detach() for i, t in enumerate(self._tensors)
                ]
                seconds = program.timed(*given)
                times += [seconds] if n else []  # the first finds cold caches and fresh memory
        for row, eq in zip(self.rows, self._rows):
            row.measured = min(seconds.get(eq, 0.0) for seconds in times)
        return self

    @property
    def seconds(self) -> tuple[float, float | None]:
        """Of one call: predicted and, after `measure()`, measured."""
        measured = [row.measured for row in self.rows]
        return sum(row.predicted for row in self.rows), None if None in measured else sum(measured)

    def memory_in_use(self) -> list[int]:
        """Bytes that a call has in use at each equation of `graph`, arguments and constants not counted."""
        return self.plan.in_use

    def changes(self, name: str) -> str:
        """What the (first) pass of that name changed, as a unified diff of the programs before and after it."""
        n = next(i for i, stage in enumerate(self.passes) if stage.name == name)
        return changed(self.passes[n - 1].graph, self.passes[n].graph) if n else ""

    def page(self, path: str | Path | None = None) -> str:
        """One HTML page that needs nothing else: memory over the schedule, time of each group, roofline, tables, and the
        program after each pass. Written to `path` if given."""
        from .explain_page import render

        text = render(self)
        if path is not None:
            Path(path).write_text(text, encoding="utf-8")
        return text

    def __str__(self) -> str:
        return "\n".join(
            [*self._passes(), "", *self._rewrites(), "", *self._memory(), "", *self._costliest()]
        )

    def _passes(self) -> list[str]:
        lines = [f"{'pass':<26}{'equations':>10}{'GFLOP':>10}{'MB moved':>10}{'rewrites':>10}{'refused':>9}"]
        for stage in self.passes:
            c, made, refused = total(stage.graph), len(stage.made) or "", len(stage.refused) or ""
            lines.append(
                f"{stage.name:<26}{len(stage.graph.equations):>10}{c.flops / 1e9:>10.3f}{c.bytes / 1e6:>10.1f}{made:>10}{refused:>9}"
            )
        return lines

    def _rewrites(self) -> list[str]:
        made = Counter(rewrite.rule for stage in self.passes for rewrite in stage.made)
        lines = ["rewrites made: " + (", ".join(f"{n} {rule}" for rule, n in made.most_common()) or "none")]
        refused = Counter(rewrite for stage in self.passes for rewrite in stage.refused)
        lines += [f"left alone: {r.rule} at {r.source}: {r.reason}" for r in list(refused)[:12]]
        return lines + ([f"... and {len(refused) - 12} more"] if len(refused) > 12 else [])

    def _memory(self) -> list[str]:
        plan = self.plan
        return [
            f"memory: an arena of {plan.arena_bytes / 1e6:.1f} MB for {len(set(plan.buffers.values()))} buffers, "
            f"{len(plan.fresh)} results in memory of their own, {len(plan.takes_over)} in that of donated arguments; "
            f"predicted peak {plan.peak_bytes / 1e6:.1f} MB"
        ]

    def _costliest(self, most: int = 12) -> list[str]:
        expected, seconds = self.seconds
        told = f"{expected * 1e3:.2f} ms by the roofline of this machine (peak of products {product_peak().value / 1e9:,.0f} GFLOP/s, {bandwidth().value / 1e9:.1f} GB/s)"
        lines = [
            f"one call: {told}" + (f", {seconds * 1e3:.2f} ms measured" if seconds is not None else ""),
            "the costliest equations; FLOP/byte is the arithmetic intensity",
            f"{'predicted':>12}{'measured':>12}{'GFLOP':>9}{'MB':>9}{'FLOP/byte':>10}  equation, line, what runs it",
        ]
        for row in ranked(self.rows)[:most]:
            measured = "" if row.measured is None else f"{row.measured * 1e3:.3f} ms"
            lines.append(
                f"{row.predicted * 1e3:>9.3f} ms{measured:>12}{row.flops / 1e9:>9.3f}{row.bytes / 1e6:>9.1f}{row.intensity:>10.1f}"
                f"  {row.name}  {row.source}  ({row.runs})\n{'':54}{row.why}"
            )
        return lines


def explain(f: Callable, *args: Any, **kwargs: Any) -> Explanation:
    """Capture and compile `f(*args, **kwargs)` (a plain or a jitted function) without running it, and tell what each
    pass did, what the equations cost, and how the memory is laid out: `print(nf.explain(f, *args))`. `.measure()` on the
    result runs it and adds measured times, `.page("explain.html")` writes a page with pictures."""
    return Explanation(f, args, kwargs)


def changed(before: Graph, after: Graph) -> str:
    a, b = str(before).splitlines(), str(after).splitlines()
    return "\n".join(list(difflib.unified_diff(a, b, lineterm="", n=1))[2:])


def ranked(rows: list[Row]) -> list[Row]:
    """Those that take longest first, by measured times if there are any."""
    return sorted(rows, key=lambda row: -row.seconds)


def why(eq: Equation, limited: bool = False) -> str:
    """How a fused group came about, or why an equation is in none. `limited`: as many rewrites were made as may be."""
    if isinstance(eq.op, Joined):
        return eq.op.why
    if role(eq) is not None and limited:
        return "not fused: max_rewrites allows no more"
    if role(eq) is not None:
        return "not fused: no neighbour over the same elements, and PyTorch's operator runs one as well"
    if getattr(eq.op, "namespace", "") == "neuralforge" or attention_flops(eq) is not None:
        return "a kernel of its own"
    if getattr(eq.op, "overloadpacket", None) in flop_registry:
        return "a product: the fastest call for its shapes on this machine"
    return (
        "not fused: neither elementwise nor a reduction of rows or columns that there is C for, on its dtypes"
    )


def multiplied(eq: Equation) -> torch.dtype:
    """In which type it computes: that of the factors, if it is a product with others joined to it."""
    while hasattr(eq.op, "product"):
        eq = eq.op.product
    return eq.inputs[0].dtype if eq.inputs else torch.float32


def predicted(eq: Equation) -> float:
    """Seconds by the roofline: as long as its arithmetic takes at the measured peak or its memory traffic at the measured
    bandwidth, whichever is longer. Data that a cache holds moves faster than that."""
    c, dtype = cost(eq), multiplied(eq)
    if isinstance(eq.op, Fused):
        arithmetic = additions(eq.op.graph) / (arithmetic_peak(dtype).value / 2)
    else:
        arithmetic = c.flops / product_peak(dtype).value
    return max(arithmetic, c.bytes / bandwidth().value)
