"""The derivative table: how rules are written and found.

A rule is a function of an operator's result and arguments. It is called once, when the operator runs, and returns one
`Derivative` for each positional argument (or a single one for the first); None where there is nothing to
differentiate. What a derivative's functions close over is what the tape keeps, so name only what is needed:

    @rule("tanh")
    def tanh(y, x):
        return diagonal(lambda: 1 - y * y)

    @rule("mm")
    def mm(y, a, b):
        return linear(lambda g: g @ adjoint(b)), linear(lambda g: adjoint(a) @ g)

Rules don't care for broadcasting or type promotion: the tape sums a cotangent to its argument's shape and casts it to
its dtype; forward mode expands and casts a tangent likewise. Where an operator gives several results, the cotangent
is a tuple with None for results that nobody used. Complex cotangents follow torch.autograd: the conjugate of the
Wirtinger derivative, so that gradient descent subtracts the gradient.

Rules call operators that themselves have a rule or a definition, so every derivative can be differentiated again.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch._decomp import decomposition_table

aten = torch.ops.aten


class Derivative(NamedTuple):
    """`vjp(g)` pulls a cotangent back to the argument; `jvp(t)` pushes a tangent of the argument forward."""

    vjp: Callable[[Any], Any]
    jvp: Callable[[Any], Any] | None = None
    """None: the operator is linear in this argument, so forward mode applies it to the tangent."""


class Joint(NamedTuple):
    """For operators whose backward is one kernel: `vjp(g, wanted)` gives the cotangents of all positional arguments
    at once; `wanted` says which of them are used."""

    vjp: Callable[[Any, tuple[bool, ...]], Any]


class Rule(NamedTuple):
    derivatives: Callable[..., Any]
    forward: bool
    """False: forward mode differentiates the operator's definition instead."""


rules: dict[Any, Rule] = {}
"""Keyed by operator (`aten.mul`), or by overload where overloads differ (`aten.pow.Tensor_Scalar`); by name, if PyTorch
registers it later."""

definitions: dict[Any, Callable] = {}
"""Operators as plain compositions of others, where PyTorch's own decomposition is missing or unsuited."""


def rule(*names: str, forward: bool = True) -> Callable[[Callable], Callable]:
    """Register a derivative rule for ATen operators, named `mul` or `pow.Tensor_Scalar` (`namespace::name` for
    others)."""

    def register(fn: Callable) -> Callable:
        for name in names:
            rules[operator(name)] = Rule(fn, forward)
        return fn

    return register


def definition(*names: str) -> Callable[[Callable], Callable]:
    """Register the plain composition that an operator descends into when there is no rule for it."""

    def register(fn: Callable) -> Callable:
        for name in names:
            definitions[operator(name)] = fn
        return fn

    return register


def nondifferentiable(*names: str) -> None:
    """Operators whose derivative is zero wherever it exists, or whose results are indices, masks or shapes."""
    for name in names:
        rules[operator(name)] = Rule(lambda *args, **kwargs: None, True)


def operator(name: str) -> Any:
    namespace, _, name = name.rpartition("::")
    found: Any = getattr(torch.ops, namespace or "aten")
    for part in name.split("."):
        found = getattr(found, part)
    return found


def find_rule(op: Any) -> Rule | None:
    return rules.get(op) or rules.get(op.overloadpacket) or rules.get(op._schema.name)


def find_definition(op: Any) -> Callable | None:
    """The operator as a composition of simpler ones: ours, PyTorch's, or that of a primitive (`prims.*`)."""
    found = definitions.get(op) or definitions.get(op.overloadpacket) or decomposition_table.get(op)
    if found is None and op.namespace == "prims":
        found = getattr(torch._prims, op.overloadpacket.__name__.split(".")[-1]).impl_aten
    return found


def diagonal(derivative: Callable[[], Any]) -> Derivative:
    """An operator that acts on each element by itself; `derivative()` is dy/dx there (a tensor or a number)."""
    return Derivative(lambda g: g * conj(derivative()), lambda t: t * derivative())


def linear(vjp: Callable[[Any], Any]) -> Derivative:
    """An operator linear in the argument (the others held fixed); `vjp` is its adjoint."""
    return Derivative(vjp)


def symmetric(derivative: Callable[[Any], Any]) -> Derivative:
    """An operator whose derivative, a map of cotangents and tangents alike, is its own adjoint: a mask, a real factor."""
    return Derivative(derivative, derivative)


identity = symmetric(lambda g: g)


def conj(x: Any) -> Any:
    """The complex conjugate, of a tensor or number; a real one unchanged."""
    if isinstance(x, torch.Tensor):
        return torch.conj_physical(x) if x.is_complex() else x
    return x.conjugate() if isinstance(x, complex) else x


def plus(*terms: Any) -> Any:
    """The sum of the terms that aren't None."""
    total = None
    for t in terms:
        if t is not None:
            total = t if total is None else total + t
    return total


def adjoint(x: torch.Tensor) -> torch.Tensor:
    """The conjugate transpose of (batches of) matrices."""
    return conj(x.transpose(-2, -1))
