"""Where every value of a graph lives: the memory plan.

- an *external* value is an input or a constant;
- a *view* shares the memory of another value, its root;
- an *arena* value is written by an operator that takes its destination (`out=`), into a slice of one arena laid out
  from the lifetimes; an elementwise operator may write over an input that dies there;
- an *output* of such an operator that leaves the graph gets memory of its own at each call, or takes over that of a
  donated input;
- an *own* value is allocated by its operator, and freed after its last use.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from itertools import accumulate

import torch

from ..graph.ir import Equation, Graph, Value, leaves
from ..graph.tracer import operator_traits
from ..memory import Buffer, assign_offsets
from .kernels import Kernel


@dataclass
class Plan:
    """The decisions, and what they cost."""

    roots: dict[Value, Value]
    """Views, with the value whose memory they show."""
    buffers: dict[Value, Buffer] = field(default_factory=dict)
    takes_over: dict[Value, Value] = field(default_factory=dict)
    """Outputs written into the memory of a donated input."""
    fresh: list[Value] = field(default_factory=list)
    """Outputs with memory of their own at each call."""
    arena_bytes: int = 0
    peak_bytes: int = 0
    """Predicted peak of everything allocated by a call: the arena, fresh outputs, and what operators allocate."""
    birth: dict[Value, int] = field(default_factory=dict)
    death: dict[Value, int] = field(default_factory=dict)
    """First and last equation at which each value's memory is in use; inputs and constants have no birth."""
    in_use: list[int] = field(default_factory=list)
    """Bytes in use at each equation."""


def root_of(roots: dict[Value, Value], value: Value) -> Value:
    while value in roots:
        value = roots[value]
    return value


def is_view(eq: Equation) -> bool:
    """Do the results share the memory of the first argument?"""
    return not hasattr(eq.op, "graph") and operator_traits(eq.op).is_view


def plan_memory(graph: Graph, kernels: dict[Equation, Kernel], donated: list[Value]) -> Plan:
    """Decide the storage of each value. `kernels` are the equations whose operator writes into a destination."""
    roots = {v: eq.args[0] for eq in graph.equations if is_view(eq) for v in eq.results}
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
    end = len(graph.equations)
    escaping = {root_of(roots, v) for v in leaves(graph.outputs)}
    for v in escaping:
        death[v] = end
    free_inputs = [v for v in donated if v not in escaping]

    for i, eq in enumerate(graph.equations):
        kernel = kernels.get(eq)
        if kernel is None:
            continue
        # An operand that is also read through a view, in another order perhaps, can't be written over.
        memory = Counter(root_of(roots, v) for v in dict.fromkeys(eq.inputs))
        dying = [v for v in memory if death[v] == i and memory[v] == 1 and v in eq.inputs]
        for out in eq.results:
            if out in escaping:
                source = _take_over(out, i, dying, kernel, free_inputs, death)
                if source is None:
                    plan.fresh.append(out)
                else:
                    plan.takes_over[out] = source
                    free_inputs.remove(source)
                continue
            reusable = (v for v in dying if v in plan.buffers and _alike(v, out) and kernel.may_overwrite(out, v))
            reused = next(reusable, None)
            if reused is not None:
                dying.remove(reused)
                plan.buffers[out] = plan.buffers[reused]
                plan.buffers[out].last = death[out]
            else:
                plan.buffers[out] = Buffer(_extent(out), i, death[out])

    plan.arena_bytes = assign_offsets(list(dict.fromkeys(plan.buffers.values())))
    plan.birth, plan.death = birth, death
    own = [v for v in birth if v not in roots and v not in plan.buffers and v not in plan.takes_over and v not in plan.fresh]
    fresh = sum(v.nbytes for v in plan.fresh)
    plan.peak_bytes = plan.arena_bytes + fresh + max(_profile(own, birth, death, end), default=0)
    mine = [v for v in birth if v not in roots and v not in plan.takes_over]
    plan.in_use = _profile(mine, birth, death, end)
    return plan


def _take_over(
    out: Value, i: int, dying: list[Value], kernel: Kernel, free: list[Value], death: dict[Value, int]
) -> Value | None:
    """A donated input whose memory `out` may have: read for the last time before it, or by the same elementwise
    operator."""
    for v in dying:
        if v in free and _alike(v, out) and kernel.may_overwrite(out, v):
            dying.remove(v)
            return v
    return next((v for v in free if _alike(v, out) and death.get(v, -1) < i), None)


def _alike(a: Value, b: Value) -> bool:
    return (a.shape, a.strides, a.dtype, a.device) == (b.shape, b.strides, b.dtype, b.device)


def _extent(v: Value) -> int:
    """Bytes from the first element to the last."""
    if v.fake.numel() == 0:
        return 0
    return (1 + sum((n - 1) * s for n, s in zip(tuple(v.shape), v.strides))) * v.fake.element_size()


def _profile(values: list[Value], birth: dict[Value, int], death: dict[Value, int], end: int) -> list[int]:
    """Bytes that `values` hold at each equation."""
    changes = [0] * (end + 2)
    for v in values:
        changes[birth[v]] += v.nbytes
        changes[death[v] + 1] -= v.nbytes
    return list(accumulate(changes))[:end]


def empty_like(v: Value, memory: torch.Tensor, offset: int) -> torch.Tensor:
    """A tensor of v's type in the bytes of `memory` from `offset`."""
    typed = memory[offset : offset + _extent(v)].view(v.dtype)
    return typed.as_strided(v.shape, v.strides)
