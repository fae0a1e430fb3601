"""Running a planned graph: straight-line Python, one call an equation, nothing decided at run time."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from threading import get_ident
from typing import Any

import torch

from ..errors import CaptureError
from ..graph.ir import Equation, Graph, Value, leaves
from ..graph.source import user_line
from ..memory import Arena, keep_pages
from .kernels import Kernel
from .planning.plan import Plan, empty_like, plan_memory
from .space import memory_order
from .storage import copied, is_view


class Program:
    """A compiled graph. Called with the graph's input tensors, returns its flat outputs.

    `donated` inputs may be overwritten: their memory goes to outputs of the same type. `arena`: shared with programs that
    don't run at the same time. `source` is the generated Python, `plan` the memory plan.
    """

    def __init__(
        self, graph: Graph, kernels: dict[Equation, Kernel], donated: list[Value], arena: Arena | None = None
    ):
        keep_pages()
        self.graph, self.kernels = graph, kernels
        self.plan: Plan = plan_memory(graph, kernels, donated)
        self.arena = arena or Arena()
        self._otherwise: set[Equation] | None = None  # operators that lay out results otherwise than planned; None: not looked at yet
        _check_not_running(self.arena)
        with self.arena.lock:
            self._bind()

    def _bind(self) -> None:
        """Write the program for the arena's memory as it is now."""
        memory = self.arena.at_least(self.plan.arena_bytes, self)
        writer = _Writer(self.graph, self.plan, self.kernels, memory, self._otherwise or set())
        self.source, self._namespace = writer.write()
        self._equations = writer.equations
        self._viewed = [(t, t.data_ptr()) for t in writer.viewed]
        self._run = self._defined(self.source, self._namespace)

    def _first_run(self, tensors: tuple) -> list[Any]:
        """A run that looks how operators lay out their results: otherwise than their fake ones, perhaps, and views would show other
        elements. The results of those that do are copied from then on."""
        looked_at = {eq for eq in self.graph.equations if eq not in self.kernels and not is_view(eq)}
        writer = _Writer(self.graph, self.plan, self.kernels, self.arena.at_least(self.plan.arena_bytes, self), looked_at)
        source, namespace = writer.write()
        found: set[str] = set()

        def laid_out(name: str, t: torch.Tensor, *planned: Any) -> torch.Tensor:
            laid = _laid_out(name, t, *planned)
            if laid is not t:
                found.add(name)
            return laid

        results = self._defined(source, namespace | {"laid_out": laid_out})(*tensors)
        self._otherwise = {eq for eq in looked_at if any(v.name in found for v in eq.results)}
        if self._otherwise:
            self._bind()
        return results

    def release(self) -> None:
        """Let go of the arena's memory, which another program makes larger."""
        self._run, self._namespace = None, {}

    def _defined(self, source: str, namespace: dict[str, Any]) -> Any:
        exec(compile(source, "<neuralforge program>", "exec"), namespace)
        return namespace.pop("program")

    def _bind_again(self) -> None:
        """If another program has taken the arena, or a constant's memory isn't that which views were made of."""
        if self._run is None or any([t.data_ptr() != at for t, at in self._viewed]):
            with torch.inference_mode(False), torch.no_grad():  # later calls write to the memory too
                self._bind()

    def __call__(self, *tensors: torch.Tensor) -> list[Any]:
        arena = self.arena
        _check_not_running(arena)
        with arena.lock, _as_captured():
            arena.running = get_ident()
            try:
                self._bind_again()
                return self._first_run(tensors) if self._otherwise is None else self._run(*tensors)
            finally:
                arena.running = None

    def timed(self, *tensors: torch.Tensor) -> dict[Equation, float]:
        """Run once as a call does, with a look at the clock after each line: the seconds of each equation that has one."""
        head, *lines, last = self.source.splitlines()
        seconds, before = dict.fromkeys(filter(None, self._equations), 0.0), 0.0

        def lap(n: int) -> None:
            nonlocal before
            now = time.perf_counter()
            if self._equations[n] is not None:
                seconds[self._equations[n]] += now - before
            before = time.perf_counter()

        laps = [text for n, line in enumerate(lines) for text in (line, f"    lap({n})")]
        with self.arena.lock, _as_captured():
            self._bind_again()
            self._namespace["lap"] = lap
            run = self._defined("\n".join([head, *laps, last]), self._namespace)
            before = time.perf_counter()
            run(*tensors)
        return seconds


def _check_not_running(arena: Arena) -> None:
    """Raises CaptureError where a thread would wait for itself."""
    if arena.running == get_ident():
        raise CaptureError(
            f"{user_line()}: a jitted function is called while it runs, by an operator within it (nf.opaque) or a signal's handler. "
            f"Call the plain function there, or one that is jitted for itself."
        )


@contextmanager
def _as_captured() -> Iterator[None]:
    """Operators as they stand in the graph: recorded by no torch.autograd, which saves the dispatcher work too, and cast
    by no autocast, whose casts are in the graph."""
    with torch.no_grad(), torch._C._AutoDispatchBelowAutograd(), torch._C._DisableAutocast():
        yield


class _Writer:
    """Writes the program's text and the namespace it runs in; `equations` tells of each line which one it is a part of."""

    def __init__(self, graph: Graph, plan: Plan, kernels: dict, arena: torch.Tensor, otherwise: set[Equation]):
        self.graph, self.plan, self.kernels, self.arena = graph, plan, kernels, arena
        self.otherwise = otherwise  # of these the results are to be laid out as planned
        self.namespace: dict[str, Any] = {"empty": torch.empty_strided, "laid_out": _laid_out}
        self.names: dict[int, str] = {}  # of the namespace's things, by their id
        self.static: dict[Value, torch.Tensor] = dict(graph.constants)
        for value, buffer in plan.buffers.items():
            self.static[value] = empty_like(value, arena, buffer.offset + plan.within.get(value, 0))
        self.viewed: list[torch.Tensor] = []  # constants whose views are made here, once
        self.lines: list[str] = []
        self.equations: list[Equation | None] = []

    def write(self) -> tuple[str, dict[str, Any]]:
        graph, plan = self.graph, self.plan
        fresh, given_away = set(plan.fresh), set(plan.takes_over.values()) & set(graph.inputs)
        for eq, dead in zip(graph.equations, graph.last_uses()):
            where = f"  # {eq.name} {eq.source}".rstrip()
            if is_view(eq) and isinstance(eq.args[0], Value) and eq.args[0] in self.static:
                out = eq.op(*_resolve(eq.args, self.static), **eq.kwargs)
                self.static.update(zip(eq.results, out if isinstance(out, (tuple, list)) else [out]))
                if eq.args[0] in graph.constants:
                    self.viewed.append(graph.constants[eq.args[0]])
                continue
            if eq in plan.in_place:
                continue
            kernel = self.kernels.get(eq)
            arguments = self._tuple(eq.args) + ", " + self._dict(eq.kwargs)
            if kernel is not None:
                for v in eq.results:
                    if v in fresh:
                        self._line(f"{v} = empty({tuple(v.shape)}, {tuple(v.strides)}, dtype={self._name(v.dtype)})", eq)
                    elif v in plan.takes_over:
                        self._line(f"{v} = {plan.takes_over[v]}")
                outputs = "".join(self._name(v) + ", " for v in eq.results)
                self._line(f"{self._name(kernel.run)}(({outputs}), {arguments}){where}", eq)
            else:
                self._line(f"{self._targets(eq.outputs)} = {self._call(eq)}{where}", eq)
                for v in eq.results if eq in self.otherwise else ():
                    self._line(f"{v} = laid_out({v.name!r}, {v}, {tuple(v.shape)}, {tuple(v.strides)})", eq)
            gone = [v.name for v in dead if v not in self.static and v not in given_away]
            if gone:
                self._line("del " + ", ".join(gone))
        outputs = ", ".join(self._output(v) for v in graph.outputs)
        parameters = ", ".join(v.name for v in graph.inputs)
        body = "\n".join(f"    {line}" for line in [*self.lines, f"return [{outputs}]"])
        return f"def program({parameters}):\n{body}\n", self.namespace

    def _line(self, text: str, eq: Equation | None = None) -> None:
        self.lines.append(text)
        self.equations.append(eq)

    def _output(self, v: Any) -> str:
        # A constant is the program's own: hand out a copy.
        if not isinstance(v, Value) or v not in self.static:
            return self._name(v)
        # Backward programs are compiled for its strides, which clones of dense tensors keep.
        return f"{self._name(v)}.clone()" if memory_order(v) is not None else f"{self._name(copied)}({self._name(v)})"

    def _call(self, eq: Equation) -> str:
        arguments = [self._expr(a) for a in eq.args] + [f"{k}={self._expr(v)}" for k, v in eq.kwargs.items()]
        return f"{self._name(eq.op)}({', '.join(arguments)})"

    def _targets(self, outputs: Any) -> str:
        if isinstance(outputs, (tuple, list)):
            return "[" + ", ".join(self._targets(o) for o in outputs) + "]" if outputs else "_"
        return outputs.name if isinstance(outputs, Value) else "_"

    def _tuple(self, args: tuple) -> str:
        return "(" + "".join(self._expr(a) + ", " for a in args) + ")"

    def _dict(self, kwargs: dict) -> str:
        return "{" + ", ".join(f"{k!r}: {self._expr(v)}" for k, v in kwargs.items()) + "}"

    def _expr(self, arg: Any) -> str:
        """An argument as text: values by name, plain literals as they are, the rest through the namespace."""
        if isinstance(arg, (list, tuple)) and any(True for _ in leaves(arg)):
            inner = "".join(self._expr(a) + ", " for a in arg)
            return f"[{inner}]" if isinstance(arg, list) else f"({inner})"
        if arg is None or type(arg) in (int, bool):
            return repr(arg)
        return self._name(arg)

    def _name(self, thing: Any) -> str:
        if isinstance(thing, Value):
            if thing not in self.static:
                return thing.name
            self.namespace.setdefault(thing.name, self.static[thing])
            return thing.name
        name = self.names.setdefault(id(thing), f"k{len(self.namespace)}")
        self.namespace[name] = thing
        return name


def _laid_out(name: str, t: torch.Tensor, shape: tuple[int, ...], strides: tuple[int, ...]) -> torch.Tensor:
    """The result `name`, a copy if its strides aren't these; those of dimensions of one element say nothing."""
    if t.numel() == 0 or all([n < 2 or a == b for n, a, b in zip(shape, t.stride(), strides)]):
        return t
    return torch.empty_strided(shape, strides, dtype=t.dtype).copy_(t)


def _resolve(args: tuple, static: dict[Value, torch.Tensor]) -> tuple:
    return tuple(static[a] if isinstance(a, Value) else a for a in args)
