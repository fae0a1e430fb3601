"""Activations written out. There are many ways to write one, so that they are known by what they compute: equations that make
one value of another, number by number, are run on some numbers, and compared."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F

from ...graph.ir import Equation, Value
from .dataflow import Dataflow
from .patterns import Match

aten = torch.ops.aten
ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "gelu": F.gelu,
    "gelu, tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
}
_CURVED = {aten.tanh, aten.erf, aten.exp, aten.sigmoid, aten.erfc, aten.special_erf}
_PLAIN = {aten.mul, aten.add, aten.sub, aten.rsub, aten.div, aten.neg, aten.pow, aten.reciprocal, aten.square, aten.clone}
NEAR, FAR = 8, 16
"""Equations after the curved function that are looked at, and the most of an activation."""
TOLERANCE = 1e-6
"""Constants are written with some digits only."""


def activations_by_hand(flow: Dataflow) -> Iterator[Match]:
    """GELU by erf or tanh, and SiLU."""
    for eq in flow.graph.equations:
        if _packet(eq) in _CURVED and eq.outputs.dtype.is_floating_point and not eq.origin.startswith("vjp"):
            match = next(_matches(flow, eq), None)
            if match is not None:
                yield match


def _packet(eq: Equation) -> object:
    return getattr(eq.op, "overloadpacket", None)


def _matches(flow: Dataflow, curved: Equation) -> Iterator[Match]:
    """Products that the curved function is in, each with what it may be a function of."""
    near = [curved]
    for eq in near:
        users = flow.users.get(eq.outputs, ())
        near += [user for user in users if _packet(user) in _PLAIN and user not in near and len(near) < NEAR]
    for end in near[1:]:
        if _packet(end) not in (aten.mul, aten.div) or end.outputs.shape != curved.outputs.shape:
            continue
        for x in _operands(flow, end, curved):
            equations = flow.between([end.outputs], {x}, FAR)
            found = _known(equations, x, end.outputs)
            if found is not None:
                replacement = lambda env, x=x, f=ACTIVATIONS[found]: [f(env[x])]
                yield Match(equations, [end.outputs], replacement, found, ("activation", found))


def _operands(flow: Dataflow, end: Equation, curved: Equation) -> list[Value]:
    """Values of which `end` may be a function, and `curved` with it: read more than once on the way."""
    seen, reads, todo = {end}, {}, [end]
    while todo and len(seen) <= FAR:
        for v in todo.pop().inputs:
            reads[v] = reads.get(v, 0) + 1
            maker = flow.producers.get(v)
            if maker is not None and maker not in seen and (maker is curved or _packet(maker) in _PLAIN):
                seen.add(maker)
                todo.append(maker)
    like = end.outputs
    return [v for v, n in reads.items() if n > 1 and v.shape == like.shape and v.dtype == like.dtype]


def _known(equations: list[Equation], x: Value, result: Value) -> str | None:
    """The activation of `x` that the equations compute as `result`, if they do."""
    if len(equations) > FAR or any(_packet(eq) not in _PLAIN | _CURVED for eq in equations):
        return None
    env = {x: torch.linspace(-6, 6, 97, dtype=torch.float64)}
    for eq in equations:
        if any(v not in env for v in eq.inputs):
            return None  # other tensors are in it
        args = [env[a] if isinstance(a, Value) else a for a in eq.args]
        env[eq.outputs] = eq.op(*args, **{k: v for k, v in eq.kwargs.items() if k != "memory_format"})
    for name, f in ACTIVATIONS.items():
        if torch.allclose(env[result], f(env[x]), rtol=0, atol=TOLERANCE):
            return name
    return None
