"""Forward mode: tangents carried beside the values, one operator at a time, by the same table of rules."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ..graph import gradient_mode, source
from ..graph.ir import op_name
from ..graph.tracer import Tracer, lazy_conjugates
from .rules.table import find_definition, find_rule
from .tape import descend, differentiable, missing_rule


class Forward(Tracer):
    """Dual numbers: a tensor made inside holds its tangent, if it has one."""

    constant = Tracer.paused

    def watch(self, x: torch.Tensor, tangent: torch.Tensor) -> torch.Tensor:
        """An alias of `x` to compute with, moving along `tangent` (same shape and dtype)."""
        alias = torch.ops.aten.alias.default(x)
        alias.__dict__[self.key] = _resolved(tangent)
        return alias

    def tangent(self, x: Any) -> Any:
        """The tangent of a tensor (of each tensor in a list), None if it doesn't move."""
        if isinstance(x, torch.Tensor):
            return x.__dict__.get(self.key)
        if isinstance(x, (list, tuple)):
            found = [self.tangent(item) for item in x]
            return found if any(t is not None for t in found) else None
        return None

    def record(self, func: Callable, args: tuple, kwargs: dict) -> Any:
        tangents = [self.tangent(a) for a in args]
        in_kwargs = any(self.tangent(v) is not None for v in kwargs.values())
        if gradient_mode.state.off or not in_kwargs and all(t is None for t in tangents):
            return func(*args, **kwargs)
        found = find_rule(func)
        if found is None or in_kwargs or not found.forward:
            definition = find_definition(func)
            if definition is not None:
                return descend(self, func, definition, args, kwargs)
        out = func(*args, **kwargs)
        results = list(out) if isinstance(out, (tuple, list)) else [out]
        if not any(differentiable(r) for r in results):
            return out
        if found is None or in_kwargs:
            raise missing_rule(func)
        derivatives = found.derivatives(out, *args, **kwargs)
        if derivatives is None:
            return out
        if hasattr(derivatives, "vjp"):
            derivatives = (derivatives,)
        total: list[Any] = [None] * len(results)
        with source.attributed(source.user_line() if source.capturing else "", f"jvp of {op_name(func)}"):
            for i, (t, derivative) in enumerate(zip(tangents, derivatives)):
                if t is None or derivative is None:
                    continue
                if derivative.jvp is not None:
                    pushed = derivative.jvp(t)
                else:
                    if isinstance(t, list):
                        t = [torch.zeros_like(x) if d is None else d for x, d in zip(args[i], t)]
                    pushed = func(*args[:i], t, *args[i + 1 :], **kwargs)
                for j, p in enumerate(pushed if isinstance(out, (tuple, list)) else [pushed]):
                    if p is not None:
                        total[j] = p if total[j] is None else total[j] + p
            for r, t in zip(results, total):
                if t is not None and differentiable(r):
                    r.__dict__[self.key] = _fit(t, r)
        return out


def _fit(t: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    if t.shape != like.shape:
        t = t.expand(like.shape)
    if t.dtype != like.dtype:
        t = torch.real(t).to(like.dtype) if t.is_complex() and not like.is_complex() else t.to(like.dtype)
    return _resolved(t)


def _resolved(t: torch.Tensor) -> torch.Tensor:
    """`t` without a conjugation or negation still to be done: the dispatcher does those of an operator's operands before it is recorded,
    and what views read of the operands' memory they read of the tangents'."""
    if not t.is_conj() and not t.is_neg():
        return t
    with lazy_conjugates():
        return t.resolve_conj().resolve_neg()
