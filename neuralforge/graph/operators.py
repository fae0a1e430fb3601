"""What a tracer needs to know of an ATen operator."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch


@dataclass(frozen=True)
class Traits:
    written: tuple[tuple[str, int | None], ...]
    """Names and positions (None: keyword-only) of the arguments it writes to."""
    is_view: bool
    passive: bool
    """It computes no tensor: sizes, devices."""
    composite: bool
    """PyTorch defines it by other operators. Those called from user code arrive here already decomposed; those
    called while a tracer is at work (by a derivative rule, say) do not."""
    makes_complex: bool
    """It may give complex results from real arguments."""

    @property
    def pure(self) -> bool:
        """It computes tensors, by itself, and writes to none."""
        return not (self.written or self.passive or self.composite)


@cache
def operator_traits(func: Any) -> Traits:
    schema = func._schema
    written, positional, is_view = [], 0, False
    for a in schema.arguments:
        at = None if a.kwarg_only else positional
        positional += not a.kwarg_only
        if a.alias_info is not None and a.alias_info.is_write:
            written.append((a.name, at))
        elif a.alias_info is not None and at == 0:
            is_view = any(r.alias_info is not None for r in schema.returns)
    is_view = is_view or schema.name in _UNMARKED_VIEWS
    passive = func.namespace == "prim" or not any("Tensor" in str(r.type) for r in schema.returns) and not written
    composite = func.namespace != "prim" and torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd")
    passive = passive and torch.Tag.data_dependent_output not in func.tags
    makes_complex = any(word in func._schema.name for word in ("fft", "eig", "complex", "polar"))
    return Traits(tuple(written), is_view, passive, composite, makes_complex)


def is_random(func: Any) -> bool:
    """May an operator read torch's generator of random numbers?"""
    return isinstance(func, torch._ops.OpOverload) and _reads_generator(func)


@cache
def _reads_generator(func: torch._ops.OpOverload) -> bool:
    return torch.Tag.nondeterministic_seeded in func.tags or func.overloadpacket in _UNTAGGED


def draws(func: Any, args: tuple, kwargs: dict) -> bool:
    """Does this call of an operator read it? Attention does if its dropout_p isn't zero."""
    if not is_random(func):
        return False
    at = _dropout_at(func)
    return at is None or bool(args[at] if at < len(args) else kwargs.get("dropout_p", 0.0))


@cache
def _dropout_at(func: Any) -> int | None:
    names = [a.name for a in func._schema.arguments]
    return names.index("dropout_p") if "dropout_p" in names else None


def is_collective(func: Any) -> bool:
    """Is it an operator that the other ranks take part in? (`torch.distributed._functional_collectives` is made of these.)"""
    return getattr(func, "namespace", "") == "_c10d_functional"


def is_unique(func: Any) -> bool:
    """May a call of an operator not stand for another one with equal arguments, nor be made beforehand?"""
    return is_random(func) or is_collective(func)


def has_effect(func: Any, args: tuple, kwargs: dict) -> bool:
    """Is this call of an operator to be made once and in its turn, whether its result is read or not? A draw moves torch's generator;
    the other ranks wait for a collective, and have another one next if it is out of turn."""
    return is_collective(func) or draws(func, args, kwargs)


BY_STORAGE = {getattr(torch.ops.aten, name) for name in ("as_strided", "as_strided_scatter", "as_strided_copy")}
"""Operators that go by the memory of their argument, not by its elements."""

_UNMARKED_VIEWS = {"aten::_unsafe_view", "aten::unsafe_split", "aten::unsafe_split_with_sizes", "aten::unsafe_chunk"}
"""Operators whose results share the argument's memory, and whose schemas don't say so. The rest of the operator database has
none."""

_UNTAGGED = {
    getattr(torch.ops.aten, name) for name in ("normal_functional", "random", "random_", "binomial", "_sample_dirichlet")
}
"""Random operators that PyTorch doesn't tag as such."""
