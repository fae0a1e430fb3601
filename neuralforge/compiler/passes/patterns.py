"""Rewriting as data: a rule finds equations that compute something the plain way, and names the operator that does it
better. The derivative comes by itself.

A rule is a generator of `Match`es: the equations found, the values they are wanted for, and a function of tensors that
computes the same. If the program holds the backward pass of those equations too, it is recognised by differentiating
them once more: the tape writes the same derivative wherever it finds the same equations, so what it writes now must be
in the program, equation for equation. The derivative of the replacement then takes its place.

Programs are compared by the numbers of their values (`numbers.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import combinations
from typing import Any, NamedTuple

import torch

from ...autograd import vjp
from ...graph import capture
from ...graph.builder import Builder
from ...graph.ir import Equation, Graph, Value, leaves, substitute
from ...graph.operators import has_effect
from .dataflow import Dataflow, is_identity
from .layout import emit, follow
from .numbers import COMMUTATIVE, Numbers, form, hashable
from .rewrites import make, refuse
from .simplify import dead_code

aten = torch.ops.aten


@dataclass(eq=False)
class Match:
    """Equations that compute `outputs`, and `replacement(env)`, which computes the same, a tensor for each output,
    from `env`, the tensors for the values that the equations read. `key` tells replacements of like equations apart."""

    equations: list[Equation]
    outputs: list[Value]
    replacement: Callable[[dict[Value, torch.Tensor]], list[torch.Tensor]]
    reason: str
    key: Any = None
    differentiable: int | None = None
    """The first so many outputs have a derivative (None: all)."""

    @property
    def again(self) -> bool:
        """Was it recomputed on purpose?"""
        return any(eq.origin.startswith("recomputed") for eq in self.equations)


Rule = Callable[[Dataflow], Iterator[Match]]


def applied(*rules: Rule) -> Callable[[Graph], Graph]:
    """A pass that applies the rules, one after the other, wherever they match."""

    def rewrite_patterns(graph: Graph) -> Graph:
        for rule in rules:
            graph = _apply(graph, rule)
        return graph

    return rewrite_patterns


def _apply(graph: Graph, rule: Rule) -> Graph:
    flow = Dataflow(graph)
    matches = list(rule(flow))
    if not matches:
        return graph
    numbers, plans, gone = Numbers(graph), [], set()
    for match in matches:
        source = flow.producers[match.outputs[0]].source
        try:
            plan = _Plan(flow, numbers, match)
        except (_Unfit, RuntimeError) as why:  # RuntimeError: operands that its replacement doesn't take
            refuse(rule.__name__, source, str(why).split("\n")[0])
            continue
        if plan.replaced.keys() & gone or not make(rule.__name__, source, match.reason):
            continue  # the same computation found twice
        gone |= plan.replaced.keys()
        numbers.taken |= plan.taken
        plans.append(plan)
    return _rebuild(graph, plans, rule.__name__) if plans else graph


class _Unfit(Exception):
    """Why a match is left alone."""


class _Plan:
    """How one match is replaced: its outputs where the first of them is made, and the gradients of each pullback found
    where the first of those is."""

    def __init__(self, flow: Dataflow, numbers: Numbers, match: Match):
        self.match = match
        own = {v for eq in match.equations for v in eq.results}
        self.inputs = list(dict.fromkeys(v for eq in match.equations for v in eq.inputs if v not in own))
        pulled, pullbacks = _backward_passes(match, self.inputs, numbers)
        self.new = _template(match.replacement, match, self.inputs, pulled)
        for pullback in pullbacks:
            for i in [i for i in pullback.gradients if self.new.gradients[i] not in self.new.backward]:
                del pullback.gradients[i]  # an operand that the replacement has no gradient of
            for i, n in list(pullback.gradients.items()):
                if n in pullback.cotangents or any(eq in numbers.taken for eq in numbers.makers.get(n, ())):
                    del pullback.gradients[i]
                    pullback.spared.add(n)
        pullbacks = _checked(flow, numbers, pullbacks)
        inside = set().union(*(pullback.inside for pullback in pullbacks))
        self.taken = {eq for n in inside for eq in numbers.makers.get(n, ())}
        values = lambda i, n, by: {v: (by, i) for v in numbers.values[n]}
        self.replaced: dict[Value, tuple[Any, int]] = {}
        """Of each value by what: ("forward", i) for output i, (p, i) for input i's gradient of the p-th pullback."""
        for i, v in enumerate(match.outputs):
            self.replaced.update(values(i, numbers.of[v], "forward"))
        self.forward_at = _room(flow, numbers, list(self.replaced), self.inputs, inside)
        self.backward_at: list[tuple[int, list[Value]]] = []
        for pullback in pullbacks if pulled else ():
            gradients: dict[Value, tuple[Any, int]] = {}
            for i, n in pullback.gradients.items():
                gradients.update(values(i, n, len(self.backward_at)))
            if not gradients:
                continue
            cotangents = [min(numbers.values[n], key=flow.place) for n in pullback.cotangents]
            at = _room(flow, numbers, list(gradients), cotangents, inside, self.forward_at)
            self.replaced.update(gradients)
            self.backward_at.append((at, cotangents))


def _room(
    flow: Dataflow, numbers: Numbers, made: list[Value], read: list[Value], inside: set[int], after: int = 0
) -> int:
    """Where to put equations that read `read` and make `made` anew, not before `after`: before its first reader that stays."""
    at = max([after, *(flow.place(v) + 1 for v in read), min(flow.place(v) for v in made)])
    for v in made:
        for eq in flow.users.get(v, ()):
            if flow.position[eq] < at and not all(numbers.of[r] in inside for r in eq.results):
                raise _Unfit("its results are needed before all its operands are there")
    return at


def _backward_passes(match: Match, inputs: list[Value], numbers: Numbers) -> tuple[tuple[int, ...], list[_Pullback]]:
    """Of which of its outputs the match is differentiated in the program, as many as can be, and where."""
    floating = [i for i, v in enumerate(match.outputs[: match.differentiable]) if v.dtype.is_floating_point]
    region = Graph(inputs=inputs, equations=match.equations, outputs=match.outputs)
    for count in range(len(floating), -1, -1):
        for pulled in combinations(floating, count):
            template = _template(lambda env: region(*(env[v] for v in inputs)), match, inputs, pulled, "plain")
            pullbacks = list(template.find(inputs, numbers))
            if pullbacks or not pulled:
                return pulled, pullbacks
    raise AssertionError


def _checked(flow: Dataflow, numbers: Numbers, pullbacks: list[_Pullback]) -> list[_Pullback]:
    """Those that the match is replaced with. A linear function of the same operand has the same derivative by its other operands, so
    that its pullback is found for this one too, but for some gradients: if those with fewer don't fit they belong elsewhere."""
    try:
        _check(flow, numbers, pullbacks)
    except _Unfit:
        most = max(len(pullback.gradients) for pullback in pullbacks)
        own = [pullback for pullback in pullbacks if len(pullback.gradients) == most]
        if len(own) == len(pullbacks):
            raise
        pullbacks = own
        _check(flow, numbers, pullbacks)
    return pullbacks


def _check(flow: Dataflow, numbers: Numbers, pullbacks: list[_Pullback]) -> None:
    """What the replacement doesn't compute mustn't be read by anybody else, unless it is computed from no operand with
    a gradient, or is a view of an operand."""
    inside = set().union(*(p.inside for p in pullbacks))
    gone = inside - {n for p in pullbacks for n in (*p.spared, *p.gradients.values())}
    results = {numbers.of[v] for v in flow.results}
    if gone & results:
        raise _Unfit("a value inside it is a result of the program")
    for n in gone:
        for eq in numbers.readers.get(n, ()):
            if not any(numbers.of[v] in inside for v in eq.results):
                raise _Unfit(f"a value inside it is also read by {eq.name}, {eq.source}")


class _Pullback(NamedTuple):
    """Where in a program the equations of a template are, by numbers."""

    cotangents: list[int]
    gradients: dict[int, int]
    """Of the inputs (by their place) that have one."""
    inside: set[int]
    """All that is computed, cotangents and operands apart."""
    spared: set[int]
    """Those of them that may be read by others."""


class _Template:
    """What the tape makes of a function: a graph that takes its inputs and the cotangents of some outputs, and
    gives the outputs and the gradients of the inputs in `wanted`."""

    def __init__(self, graph: Graph, inputs: int, outputs: int, wanted: list[int], again: bool):
        self.graph, self.again = graph, again
        self.inputs, self.cotangents = graph.inputs[:inputs], graph.inputs[inputs:]
        self.outputs, self.gradients = graph.outputs[:outputs], dict(zip(wanted, graph.outputs[outputs:]))
        self.producers = graph.producers()
        self.backward, self.spared = set(self.cotangents), set(self.outputs)
        differentiated = {*self.cotangents, *(self.inputs[i] for i in wanted)}
        views = set(self.inputs)
        for eq in graph.equations:
            if any(v in self.backward for v in eq.inputs):
                self.backward.update(eq.results)
            if any(v in differentiated for v in eq.inputs):
                differentiated.update(eq.results)
            if form(eq)[0] == "view" and eq.args[0] in views:
                views.update(eq.results)
        self.spared |= views | {v for eq in graph.equations for v in eq.results if v not in differentiated}

    def find(self, inputs: list[Value], numbers: Numbers) -> Iterator[_Pullback]:
        """Where the template is in a program of which `inputs` are values; without cotangents, the forward pass only."""
        start: dict[Value, int | None] = {t: numbers.of[v] for t, v in zip(self.inputs, inputs)}
        self._bind(numbers, start)
        if None in (start[v] for v in self.outputs):  # the tape took an operator apart, and the program has it whole
            return
        seen = set()
        for bound in self._solutions(numbers, start):
            cotangents = tuple(bound[v] for v in self.cotangents)
            gradients = {i: bound[v] for i, v in self.gradients.items() if v in self.backward}
            gradients = {i: n for i, n in gradients.items() if n is not None}
            if cotangents in seen or self.cotangents and not gradients:
                continue
            seen.add(cotangents)
            given = {bound[v] for v in (*self.inputs, *self.cotangents)}
            inside = {n for n in bound.values() if n is not None} - given
            yield _Pullback(list(cotangents), gradients, inside, {bound[v] for v in self.spared})

    def _bind(self, numbers: Numbers, bound: dict[Value, int | None]) -> None:
        """Number what follows from what is numbered; None: the program doesn't have it."""
        for eq in self.graph.equations:
            if any(v not in bound for v in eq.inputs) or all(v in bound for v in eq.results):
                continue
            if is_identity(eq):
                bound[eq.outputs] = bound[eq.args[0]]
                continue
            key = None
            if not any(bound[v] is None for v in eq.inputs):
                again = self.again and not eq.origin.startswith("vjp")
                key = (again, *numbers.key(eq, bound)[1:])
            for i, v in enumerate(eq.results):
                bound[v] = numbers.known.get((key, i))

    def _solutions(self, numbers: Numbers, bound: dict) -> Iterator[dict]:
        """Every way to number the cotangents: what reads something known of the forward pass is compared."""
        rest = [v for v in self.cotangents if v not in bound]
        if not rest:
            yield bound
            return
        for eq in self.graph.equations:
            known = [bound[v] for v in eq.inputs if bound.get(v) is not None]
            if not known or is_identity(eq) or all(v in bound for v in eq.inputs):
                continue
            for found in min((numbers.readers.get(n, []) for n in known), key=len):
                trial = dict(bound)
                if found in numbers.taken or not _alike(eq, found, trial, numbers, self.producers):
                    continue
                if any(v in trial for v in rest) and self._fits(numbers, trial):
                    self._bind(numbers, trial)
                    yield from self._solutions(numbers, trial)

    def _fits(self, numbers: Numbers, bound: dict) -> bool:
        """Have the cotangents the shapes and types they should have?"""
        types = lambda v: (v.shape, v.dtype)
        return all(types(numbers.values[bound[v]][0]) == types(v) for v in self.cotangents if v in bound)


def _alike(eq: Equation, found: Equation, bound: dict, numbers: Numbers, producers: dict[Value, Equation]) -> bool:
    """Can `found`, in the program, be `eq`, of a template? If so `bound` learns what the operands are."""
    (name, args), (other, others) = form(eq), form(found)
    if name != other or len(args) != len(others):
        return False
    if name in COMMUTATIVE and isinstance(args[1], Value) and isinstance(others[1], Value):
        for order in ((0, 1), (1, 0)):
            trial = dict(bound)
            if all(_same(args[i], others[order[i]], trial, numbers, producers) for i in (0, 1)):
                bound.update(trial)
                return True
        return False
    given, wanted = (others, found.kwargs), (args, eq.kwargs)
    return _same(wanted, given, bound, numbers, producers)


def _same(want: Any, have: Any, bound: dict, numbers: Numbers, producers: dict[Value, Equation]) -> bool:
    if isinstance(want, Value):
        return isinstance(have, Value) and _is_number(want, numbers.of[have], bound, numbers, producers)
    if isinstance(want, dict):
        return isinstance(have, dict) and want.keys() == have.keys() and all(
            _same(want[k], have[k], bound, numbers, producers) for k in want
        )
    if isinstance(want, (list, tuple)):
        return isinstance(have, (list, tuple)) and len(want) == len(have) and all(
            _same(w, h, bound, numbers, producers) for w, h in zip(want, have)
        )
    return type(want) is type(have) and repr(want) == repr(have)


def _is_number(v: Value, n: int, bound: dict, numbers: Numbers, producers: dict[Value, Equation]) -> bool:
    """Can the template's `v` be the program's number `n`?"""
    if v in bound:
        return bound[v] == n
    eq = producers.get(v)
    if eq is None:  # a cotangent
        bound[v] = n
        return True
    if is_identity(eq):
        if not _is_number(eq.args[0], n, bound, numbers, producers):
            return False
        bound[v] = n
        return True
    for maker in numbers.makers.get(n, ()):
        trial = dict(bound)
        if _alike(eq, maker, trial, numbers, producers):
            bound.update(trial)
            bound[v] = n
            return True
    return False


_templates: dict[Any, tuple] = {}


def _template(f: Callable, match: Match, inputs: list[Value], pulled: tuple[int, ...], which: str = "new") -> _Template:
    """`f(env)`, which computes the match, with its pullback; layers of the same structure share the work."""
    key = which, pulled, _structure(match, inputs)
    found = _templates.get(key)
    if found is None:
        if len(_templates) > 256:
            _templates.clear()
        found = _templates[key] = _differentiated(f, match, inputs, pulled)
    graph, wanted = found
    return _Template(graph, len(inputs), len(match.outputs), wanted, match.again)


def _differentiated(f: Callable, match: Match, inputs: list[Value], pulled: tuple[int, ...]) -> tuple[Graph, list[int]]:
    """The graph of a template, and which inputs it differentiates."""
    wanted = [i for i, v in enumerate(inputs) if v.dtype.is_floating_point]

    def both(tensors: list, cotangents: list) -> list:
        if not pulled:  # as it is: the tape would take operators without a rule apart
            return list(f(dict(zip(inputs, tensors))))
        outputs: list = []

        def forward(*differentiated: torch.Tensor) -> list:
            full = list(tensors)
            for i, x in zip(wanted, differentiated):
                full[i] = x
            outputs[:] = f(dict(zip(inputs, full)))
            return [outputs[i] for i in pulled]

        _, pullback = vjp(forward, *(tensors[i] for i in wanted))
        return [*outputs, *pullback(cotangents)]

    graph = capture(both, [v.fake for v in inputs], [match.outputs[i].fake for i in pulled]).graph
    for v, new in zip(match.outputs, graph.outputs):
        assert (v.shape, v.dtype) == (new.shape, new.dtype), f"{v.typed} would be replaced by {new.typed}"
    return dead_code(graph), wanted


def _structure(match: Match, inputs: list[Value]) -> Any:
    """All that the template of a match depends on."""
    place = {v: i for i, v in enumerate(inputs)}
    types = tuple((v.shape, v.strides, v.dtype, v.device) for v in inputs)
    for eq in match.equations:
        place.update((v, len(place)) for v in eq.results)
    body = tuple((eq.op, hashable(eq.args, place), hashable(eq.kwargs, place)) for eq in match.equations)
    return match.replacement.__qualname__, match.key, types, body, tuple(place[v] for v in match.outputs)


def _rebuild(graph: Graph, plans: list[_Plan], origin: str) -> Graph:
    """The graph with all plans carried out."""
    builder = Builder(graph)
    env: dict[Value, Any] = {}
    steps: dict[int, list[Callable[[], None]]] = {}
    for plan in plans:
        new = _Insertion(plan, builder, env, origin)
        steps.setdefault(plan.forward_at, []).append(new.forward)
        for p, (at, cotangents) in enumerate(plan.backward_at):
            steps.setdefault(at, []).append(partial(new.backward, cotangents, p))
    needed = _still_needed(graph, plans)
    for i, eq in enumerate([*graph.equations, None]):
        for step in steps.get(i, ()):
            step()
        if eq in needed:
            follow(eq, env, builder)
    return dead_code(graph.replace(equations=builder.equations, outputs=substitute(graph.outputs, env)))


def _still_needed(graph: Graph, plans: list[_Plan]) -> set[Equation]:
    """The equations that are read by something else than what the plans replace."""
    replaced = {v for plan in plans for v in plan.replaced}
    read: dict[int, list[Value]] = {}
    for plan in plans:
        read.setdefault(plan.forward_at, []).extend(plan.inputs)
        for at, cotangents in plan.backward_at:
            read.setdefault(at, []).extend([*plan.inputs, *cotangents])
    wanted, found = {*leaves(graph.outputs), *read.get(len(graph.equations), ())}, set()
    for i, eq in reversed(list(enumerate(graph.equations))):
        if any(v in wanted and v not in replaced for v in eq.results) or has_effect(eq.op, eq.args, eq.kwargs):
            wanted.update(eq.inputs)
            found.add(eq)
        wanted.update(read.get(i, ()))
    return found


class _Insertion:
    """A replacement on its way into a program; `env` learns what stands for what."""

    def __init__(self, plan: _Plan, builder: Builder, env: dict[Value, Any], origin: str):
        self.plan, self.builder, self.env, self.origin = plan, builder, env, origin
        self.again = "recomputed, " if plan.match.again else ""
        self.made: dict[Value, Any] = {}

    def forward(self) -> None:
        new = self.plan.new
        self.made.update(zip(new.inputs, (self.env.get(v, v) for v in self.plan.inputs)))
        self._emit("forward", dict(enumerate(new.outputs)), self.made, self.again + self.origin)

    def backward(self, cotangents: list[Value], p: int) -> None:
        new = self.plan.new
        made = {**self.made, **dict(zip(new.cotangents, (self.env.get(v, v) for v in cotangents)))}
        self._emit(p, new.gradients, made, self.origin)

    def _emit(self, by: Any, results: dict[int, Value], made: dict[Value, Any], origin: str) -> None:
        """The equations for those of the results that are wanted, but for what is there already."""
        wanted = {v: results[i] for v, (which, i) in self.plan.replaced.items() if which == by}
        needed, chosen = set(wanted.values()), []
        for eq in reversed(self.plan.new.graph.equations):
            if any(v in needed and v not in made for v in eq.results):
                needed.update(eq.inputs)
                chosen.append(eq)
        source = self.plan.match.equations[-1].source
        for eq in reversed(chosen):
            args, kwargs = substitute(eq.args, made), substitute(eq.kwargs, made)
            out = emit(self.builder, eq.op, *args, source=source, origin=origin, **kwargs)
            made.update(zip(eq.results, leaves(out)))
        self.env.update((v, made[new]) for v, new in wanted.items())
