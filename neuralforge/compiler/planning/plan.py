"""Where every value of a graph lives: the memory plan.

- an *external* value is an input or a constant;
- a *view* shares the memory of another value, its root;
- an *arena* value is written by an operator that takes its destination (`out=`), into a slice of one arena laid out
  from the lifetimes; an elementwise operator may write over an input that dies there;
- an *output* of such an operator that leaves the graph gets memory of its own at each call, or takes over that of a
  donated input;
- a *part* of a concatenation, which has its strides, is written where the whole will be;
- an *own* value is allocated by its operator, and freed after its last use, unless another value takes it over.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import accumulate

import torch

from ...graph.ir import Equation, Graph, Value, leaves
from ...graph.operators import operator_traits
from ...memory import Buffer, assign_offsets
from ..kernels import Kernel
from ..space import dimension
from ..storage import extent, root_of, view_roots


@dataclass
class Plan:
    """The decisions, and what they cost."""

    roots: dict[Value, Value]
    """Views, with the value whose memory they show."""
    buffers: dict[Value, Buffer] = field(default_factory=dict)
    takes_over: dict[Value, Value] = field(default_factory=dict)
    """Values written into the memory of a donated input, or of what an operator allocated."""
    fresh: list[Value] = field(default_factory=list)
    """Outputs with memory of their own at each call."""
    within: dict[Value, int] = field(default_factory=dict)
    """Parts, with their places in bytes from the beginning of the whole, which has the same buffer."""
    in_place: set[Equation] = field(default_factory=set)
    """Concatenations of such parts, which have nothing left to do."""
    arena_bytes: int = 0
    peak_bytes: int = 0
    """Predicted peak of everything allocated by a call: the arena, fresh outputs, and what operators allocate."""
    birth: dict[Value, int] = field(default_factory=dict)
    death: dict[Value, int] = field(default_factory=dict)
    """First and last equation at which each value's memory is in use; inputs and constants have no birth."""
    in_use: list[int] = field(default_factory=list)
    """Bytes in use at each equation, inputs and constants not counted."""


def plan_memory(graph: Graph, kernels: dict[Equation, Kernel], donated: list[Value]) -> Plan:
    """Decide the storage of each value. `kernels` are the equations whose operator writes into a destination."""
    roots = view_roots(graph)
    plan = Plan(roots)
    birth: dict[Value, int] = {}
    death: dict[Value, int] = {}
    for i, eq in enumerate(graph.equations):
        for v in eq.inputs:
            death[root_of(roots, v)] = i
        for v in eq.results:
            birth[v] = i
            if v not in roots:
                death[v] = i
    for v, i in _waited_for(graph):
        death[root_of(roots, v)] = max(death[root_of(roots, v)], i)
    end = len(graph.equations)
    escaping = {root_of(roots, v) for v in leaves(graph.outputs)}
    for v in escaping:
        death[v] = end
    free_inputs = dict.fromkeys(v for v in donated if v not in escaping)
    wholes = _find_parts(graph, kernels, plan, escaping)
    for part, whole in wholes.items():  # inner ones first
        death[whole] = max(death[whole], death[part])
    held = dict(death)  # until when the memory that an operator allocated is in use, by whatever value
    allocated: dict[Value, Value] = {}  # values in such memory, with the value it was made for

    for i, eq in enumerate(graph.equations):
        kernel = kernels.get(eq)
        if kernel is None:
            allocated.update((v, v) for v in eq.results if _allocates(eq))
            continue
        if eq in plan.in_place:
            continue
        shared = {y for v in eq.inputs for y in _around(root_of(roots, v), wholes)[1:]}  # wholes of which parts are read too
        dying = {v: root for v, root in _dying(eq, i, roots, death).items() if root not in wholes and root not in shared}
        for out in eq.results:
            if out in wholes:
                around = _around(out, wholes)
                buffer = plan.buffers.get(around[-1]) or Buffer(_extent(around[-1]), i, death[around[-1]])
                plan.buffers.update(dict.fromkeys(around, buffer))
                continue
            if out in escaping:
                source = _take_over(out, i, dying, kernel, free_inputs, death)
                if source is None:
                    plan.fresh.append(out)
                else:
                    plan.takes_over[out] = source
                    del free_inputs[source]
                continue
            reusable = (v for v, root in dying.items() if (root in plan.buffers or root in allocated) and _alike(v, out))
            reused = next((v for v in reusable if kernel.may_overwrite(out, v)), None)
            root = None if reused is None else dying.pop(reused)
            if root is None:
                plan.buffers[out] = Buffer(_extent(out), i, death[out])
            elif root in allocated:
                plan.takes_over[out] = reused
                allocated[out] = allocated[root]
                held[allocated[out]] = death[out]
            else:
                plan.buffers[out] = plan.buffers[root]
                plan.buffers[out].last = death[out]

    buffers = list(dict.fromkeys(plan.buffers.values()))
    plan.arena_bytes = assign_offsets(buffers)
    plan.birth, plan.death = birth, death
    own = [v for v in birth if v not in roots and v not in plan.buffers and v not in plan.takes_over]
    outside = [(birth[v], held[v], v.nbytes) for v in own]  # of the arena; the results among them stay
    outside += [(i, i, kernels[eq].scratch(eq)) for i, eq in enumerate(graph.equations) if eq in kernels]
    inside = [(buffer.first, buffer.last, buffer.nbytes) for buffer in buffers]
    plan.in_use = _profile([*outside, *inside], end)
    plan.peak_bytes = plan.arena_bytes + max(_profile(outside, end), default=0)
    return plan


def _waited_for(graph: Graph) -> Iterator[tuple[Value, int]]:
    """What collectives still read after they have returned, with the equation that waits for them."""
    waits = [(i, eq) for i, eq in enumerate(graph.equations) if eq.name == "_c10d_functional.wait_tensor"]
    producers = graph.producers() if waits else {}  # most graphs have none, and are planned many times
    for i, eq in waits:
        if eq.args[0] in producers:
            yield from ((v, i) for v in producers[eq.args[0]].inputs)


def _find_parts(
    graph: Graph, kernels: dict[Equation, Kernel], plan: Plan, escaping: set[Value]
) -> dict[Value, Value]:
    """The parts, each with the concatenation whose memory it is in, which may be a part itself; notes them in the plan."""
    cat = torch.ops.aten.cat.default
    cats = [eq for eq in graph.equations if eq.op is cat and eq in kernels and eq.outputs not in escaping]
    if not cats:
        return {}
    made = {v for eq in graph.equations if eq in kernels and eq.op is not cat for v in eq.results}
    wholes: dict[Value, Value] = {}
    for eq in cats:
        whole, dim, at, found = eq.outputs, dimension(eq), 0, {}
        for part in eq.args[0]:
            root = root_of(plan.roots, part)
            laid = all(n == 1 or s == t for n, s, t in zip(part.shape, part.strides, whole.strides))
            all_of_it = 0 < _extent(part) == _extent(root) and part.dtype == whole.dtype and root not in escaping
            if not laid or not all_of_it or root not in made or root in wholes or root in found:
                break
            found[root] = at * whole.strides[dim] * whole.fake.element_size()
            at += part.shape[dim]
        else:
            plan.within.update(found)
            plan.in_place.add(eq)
            wholes.update(dict.fromkeys(found, whole))
            made.add(whole)
    for part in reversed(wholes):  # outer ones first: places are from the beginning of the outermost
        plan.within[part] += plan.within.get(wholes[part], 0)
    return wholes


def _around(v: Value, wholes: dict[Value, Value]) -> list[Value]:
    """The value, the whole that it is a part of, the one that this is a part of, and so on."""
    around = [v]
    while around[-1] in wholes:
        around.append(wholes[around[-1]])
    return around


def _dying(eq: Equation, i: int, roots: dict[Value, Value], death: dict[Value, int]) -> dict[Value, Value]:
    """The operands whose memory nobody reads after equation `i`, with their roots. One that is read in two ways, in
    another order perhaps, can't be written over, nor can a part of a larger one."""
    operands = dict.fromkeys(eq.inputs)
    readers = Counter(root_of(roots, v) for v in operands)
    found = ((v, root_of(roots, v)) for v in operands)
    return {v: root for v, root in found if death[root] == i and readers[root] == 1 and _extent(v) == _extent(root)}


def _allocates(eq: Equation) -> bool:
    """Is the memory of the results surely the operator's own? (A user's operator may keep what it returns.)"""
    return getattr(eq.op, "namespace", "") == "aten" and not operator_traits(eq.op).written


def _take_over(
    out: Value, i: int, dying: dict[Value, Value], kernel: Kernel, free: dict[Value, None], death: dict[Value, int]
) -> Value | None:
    """A donated input whose memory `out` may have: read for the last time before it, or by the same elementwise
    operator."""
    for v in dying:
        if v in free and _alike(v, out) and kernel.may_overwrite(out, v):
            del dying[v]
            return v
    return next((v for v in free if _alike(v, out) and death.get(v, -1) < i), None)


def _alike(a: Value, b: Value) -> bool:
    return a.shape == b.shape and a.strides == b.strides and a.dtype == b.dtype and a.device == b.device


def _extent(v: Value) -> int:
    """Bytes from the first element to the last."""
    return extent(v.shape, v.strides) * v.fake.element_size()


def _profile(spans: list[tuple[int, int, int]], end: int) -> list[int]:
    """Bytes in use at each equation; each span is the first equation, the last, and the bytes."""
    changes = [0] * (end + 2)
    for first, last, nbytes in spans:
        changes[first] += nbytes
        changes[last + 1] -= nbytes
    return list(accumulate(changes))[:end]


def empty_like(v: Value, memory: torch.Tensor, offset: int) -> torch.Tensor:
    """A tensor of v's type in the bytes of `memory` from `offset`."""
    typed = memory[offset : offset + _extent(v)].view(v.dtype)
    return typed.as_strided(v.shape, v.strides)
