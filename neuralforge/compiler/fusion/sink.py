"""Sinking: a cheap result of one group that only other groups read is computed again in each of them, rather than
stored by one and loaded by the others. So a bias added before an activation, or a row scaled by its norm, costs no
memory between the forward and the backward pass."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

from ...graph.ir import Equation, Graph, Value, leaves, substitute
from ..pointwise import price, supported
from .group import LOOKED_THROUGH, Group

CHEAP = 5
"""The most additions that computing a result again may cost."""
READERS = 2
"""The most groups that compute a result again."""
SMALL = 4096
"""Elements below which a result isn't worth it."""


def sink(graph: Graph, groups: list[Group]) -> Graph:
    """The graph with such results computed where they are read; `groups` are changed to match."""
    return _Sink(graph, groups).run()


class _Sink:
    """Who makes and reads what is kept up to date; the changes are noted, and made all at once (`_changed`)."""

    def __init__(self, graph: Graph, groups: list[Group]):
        self.graph = graph
        self.outputs = set(leaves(graph.outputs))
        self.free = {*graph.inputs, *graph.constants}
        self.names = itertools.count()
        self.group_of = {eq: g for g in groups for eq in g.equations}
        self.users, self.producer = graph.users(), graph.producers()
        self.before: dict[Equation, list[Equation]] = {}
        """What is put before an equation."""
        self.instead: dict[Equation, Equation] = {}
        self.dead: set[Equation] = set()

    def run(self) -> Graph:
        for v in [v for eq in reversed(self.graph.equations) for v in eq.results]:
            eq = self.producer.get(v)
            if eq in self.group_of and supported(eq) and v not in self.outputs and v.fake.numel() >= SMALL:
                self._try(v, self.group_of[eq])
        return self.graph.replace(equations=list(self._changed(self.graph.equations)))

    def _changed(self, equations: list[Equation]) -> Iterator[Equation]:
        for eq in equations:
            yield from self._changed(self.before.get(eq, []))
            if eq in self.instead:
                yield from self._changed([self.instead[eq]])
            elif eq not in self.dead:
                yield eq

    def _link(self, eq: Equation, group: Group) -> None:
        self.group_of[eq] = group
        for v in dict.fromkeys(eq.inputs):
            self.users.setdefault(v, []).append(eq)
        self.producer.update((v, eq) for v in eq.results)

    def _unlink(self, eq: Equation) -> None:
        self.group_of.pop(eq, None)
        for v in dict.fromkeys(eq.inputs):
            self.users[v].remove(eq)
        for v in eq.results:
            del self.producer[v]

    def _try(self, v: Value, home: Group) -> None:
        readers: dict[Group, list[Equation]] = {}  # with the views through which they read
        if not self._readers(v, home, [], readers) or not 0 < len(readers) <= READERS:
            return
        cone = self._cone(v, home)
        if cone is None:
            return
        made = {x for eq in cone for x in eq.results}
        needs = [x for x in dict.fromkeys(x for eq in cone for x in eq.inputs) if x not in made]
        for group in readers:
            has = group.inputs()
            new = sum(x.nbytes for x in needs if x not in has and x not in self.free and x.fake.numel() * 8 > v.fake.numel())
            if new > v.nbytes:
                return
        changes = [self._moved(v, group, views, cone) for group, views in readers.items()]
        if all(c is not None for c in changes):
            for group, change in zip(readers, changes):
                self._apply(group, *change)
            self._prune(home, [self.producer[v], *(view for views in readers.values() for view in views)])

    def _readers(self, v: Value, home: Group, path: list[Equation], found: dict[Group, list[Equation]]) -> bool:
        """Fill `found`; False if somebody outside the groups reads the value."""
        if v in self.outputs:
            return False
        for eq in self.users.get(v, []):
            group = self.group_of.get(eq)
            if group is home:
                continue
            if group is not None:
                views = found.setdefault(group, [])
                views.extend(p for p in path if p not in views)
            elif eq.op not in LOOKED_THROUGH or not self._readers(eq.outputs, home, [*path, eq], found):
                return False
        return True

    def _cone(self, v: Value, home: Group) -> list[Equation] | None:
        """The members of the group that make the value from what is in memory anyway; None if they aren't cheap."""
        cone: list[Equation] = []
        waiting, cost = [v], 0
        while waiting:
            eq = self.producer[waiting.pop()]
            if eq in cone:
                continue
            cost += price(eq) if supported(eq) else CHEAP + 1
            if cost > CHEAP:
                return None
            cone.append(eq)
            for x in eq.inputs:
                maker = self.group_of.get(self.producer.get(x))
                if maker is home and x is not v and not self._stored(x, home):
                    waiting.append(x)
                elif x in {w for view in home.views for w in view.results}:
                    return None  # inside the group it is read through a view
        return [eq for eq in home.equations if eq in cone]

    def _stored(self, v: Value, home: Group) -> bool:
        return v in self.outputs or any(self.group_of.get(eq) is not home for eq in self.users.get(v, []))

    def _moved(self, v: Value, group: Group, views: list[Equation], cone: list[Equation]) -> tuple | None:
        """The group with the cone computed in it: (group, copies, views, replaced members); None if it doesn't fit."""
        env: dict[Value, Value] = {}

        def again(eq: Equation) -> Equation:
            for x in eq.results:
                env[x] = Value(f"{x}_again{next(self.names)}", x.fake)
            args, kwargs = substitute(eq.args, env), substitute(eq.kwargs, env)
            return Equation(eq.op, args, kwargs, substitute(eq.outputs, env), eq.source, "recomputed")

        copies = [again(eq) for eq in cone]
        own_views = [again(eq) for eq in views]
        own_views += [again(eq) for eq in group.views if eq.args[0] in env]
        env = {x: y for x, y in env.items() if x is v or any(x in eq.results for eq in (*views, *group.views))}
        members = {eq: eq.reading(env) for eq in group.equations}
        trial = group.rebuilt([*copies, *members.values()], [*group.views, *own_views])
        return None if trial is None else (trial, copies, members)

    def _apply(self, group: Group, trial: Group, copies: list[Equation], members: dict[Equation, Equation]) -> None:
        self.before.setdefault(group.equations[0], []).extend(copies)
        for eq in copies:
            self._link(eq, group)
        for old, new in members.items():
            if new is not old:
                self.instead[old] = new
                self._unlink(old)
                self._link(new, group)
        group.take(trial)

    def _prune(self, home: Group, candidates: list[Equation]) -> None:
        """Drop the candidates, members of the group and views, that nobody reads any longer, and what only they read."""
        held = {*self.outputs, *(v for view in home.views for v in view.inputs)}
        while candidates:
            eq = candidates.pop()
            ours = self.group_of.get(eq) is home or eq.op in LOOKED_THROUGH and eq not in self.group_of
            if ours and eq not in self.dead and not any(v in held or self.users.get(v) for v in eq.results):
                self.dead.add(eq)
                self._unlink(eq)
                candidates += [self.producer[v] for v in eq.inputs if v in self.producer]
        left = [eq for eq in home.equations if eq not in self.dead]
        if len(left) < len(home.equations):
            trial = home.rebuilt(left, home.views)
            if trial is not None:
                home.take(trial)
