"""Watching a PyTorch program one pure operator at a time.

`Tracer` is the base of everything that follows a program: capture, the reverse tape, forward mode. It sits under the
dispatcher (`TorchDispatchMode`), so it sees ATen operators whatever Python wrote them, and tracers nest: what the
inner one calls, the outer one sees.

It also makes the program pure. An in-place write computes a new tensor with the functional twin of the operator, and
from then on the written tensor object, and every view of the same storage, *means* the new tensor (the idea of
PyTorch's functionalization: https://dev-discuss.pytorch.org/t/functionalization-in-pytorch/965). Subclasses
override `record`, which sees pure operators only.
"""

from __future__ import annotations

import itertools
import sys
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from ..errors import CaptureError, DifferentiationError
from .ir import map_tree
from .source import user_line

aten = torch.ops.aten

_ids = itertools.count()


class Link(NamedTuple):
    """How a view was made: `view = func(base, *args, **kwargs)[index]`."""

    base: torch.Tensor
    func: Callable
    args: tuple
    kwargs: dict
    index: int | None

    def replay(self, base: torch.Tensor) -> torch.Tensor:
        out = self.func(base, *self.args, **self.kwargs)
        return out if self.index is None else out[self.index]


class Tracer(TorchDispatchMode):
    """Calls `record(func, args, kwargs)` for each pure operator. Usable once, as a context manager."""

    def __init__(self) -> None:
        super().__init__()
        self.key = f"_nf{next(_ids)}"
        self._made = self.key + "made"  # attribute: None on tensors made inside, a Link on views
        self._now = self.key + "now"  # attribute: the tensor that a written tensor means
        self._written: dict[int, weakref.ref] = {}
        self.descents: list[Any] = []  # operators whose definitions are being followed just now
        self._paused: dict[int, torch.Tensor] | None = None

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # or every operator would pass through a wrapper of torch._dynamo's

    def record(self, func: Callable, args: tuple, kwargs: dict) -> Any:
        """Apply a pure operator. Overridden by subclasses."""
        return func(*args, **kwargs)

    @contextmanager
    def paused(self) -> Iterator[dict[int, torch.Tensor]]:
        """Within, operators pass by unrecorded, on to the tracers outside this one (writes keep their meaning, though).
        Yields a dictionary that fills with the tracked tensors that are read, by id."""
        before, self._paused = self._paused, {}
        try:
            yield self._paused
        finally:
            self._paused = before

    def _pass_by(self, func: Callable, args: tuple, kwargs: dict) -> Any:
        def look(x: Any) -> None:
            if isinstance(x, torch.Tensor) and self.key in x.__dict__:
                self._paused[id(x)] = x

        if func is not aten.detach.default:
            map_tree(look, (args, kwargs))
        return func(*args, **kwargs)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        traits = operator_traits(func)
        if traits.makes_complex or _any_complex(args):
            with _lazy_conjugates():
                return self._dispatch(func, traits, args, kwargs or {})
        return self._dispatch(func, traits, args, kwargs or {})

    def _dispatch(self, func: Callable, traits: Traits, args: tuple, kwargs: dict) -> Any:
        if traits.passive:
            return func(*args, **kwargs)
        if traits.written:
            if func._schema.name.split("::")[1] in _REFUSED:
                return self._reshape(func, args, kwargs)
            return self._write(func, traits, args, kwargs)
        if traits.composite:
            with self:
                return func.decompose(*args, **kwargs)
        if self._written:
            args, kwargs = map_tree(self.now, args), map_tree(self.now, kwargs)
        out = self.record(func, args, kwargs) if self._paused is None else self._pass_by(func, args, kwargs)
        if isinstance(out, torch.Tensor):
            if self._made not in out.__dict__:
                # lift_fresh hands back the new tensor that torch.tensor gives it, of which nobody else knows
                is_view = traits.is_view and func is not aten.lift_fresh.default
                out.__dict__[self._made] = Link(args[0], func, args[1:], kwargs, None) if is_view else None
        elif isinstance(out, (tuple, list)):
            for i, item in enumerate(out):
                if isinstance(item, torch.Tensor) and self._made not in item.__dict__:
                    link = Link(args[0], func, args[1:], kwargs, i) if traits.is_view else None
                    item.__dict__[self._made] = link
        return out

    def now(self, x: Any) -> Any:
        """The tensor that `x` means after the writes so far; anything that isn't a tensor unchanged."""
        if not isinstance(x, torch.Tensor):
            return x
        link = x.__dict__.get(self._made)
        if link is None:
            meant = x.__dict__.get(self._now)
            return x if meant is None else self.now(meant)
        base = self.now(link.base)
        if base is link.base:
            return x
        seen = x.__dict__.get(self._now)
        if seen is None or seen[0] is not base:
            paused, self._paused = self._paused, None  # a view of a tracked tensor is tracked
            with self:
                seen = x.__dict__[self._now] = (base, link.replay(base))
            self._paused = paused
        return seen[1]

    def external_writes(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Tensors from outside that the program wrote to, with what each now means."""
        return [(t, self.now(t)) for t in self.live_writes() if self._made not in t.__dict__]

    def live_writes(self) -> list[torch.Tensor]:
        """The written tensors, from outside or made inside, that still exist."""
        return [t for ref in self._written.values() if (t := ref()) is not None]

    def write_back(self) -> None:
        """Carry the writes out on tensors from outside. Called after the tracer has been left."""
        for tensor, new in self.external_writes():
            tensor.copy_(new)

    def _write(self, func: Callable, traits: Traits, args: tuple, kwargs: dict) -> Any:
        """An operator that writes to its arguments: compute the new values, then rebind the written tensors."""
        groups = [kwargs[name] if at is None else args[at] for name, at in traits.written]
        targets = [t for group in groups for t in (group if isinstance(group, (list, tuple)) else [group])]
        with self:
            values, result = _functional(func, map_tree(self.now, args), map_tree(self.now, kwargs), len(targets))
        for target, value in zip(targets, values):
            if value.shape != target.shape:
                raise CaptureError(
                    f"{user_line()}: {func} writes a result of shape {tuple(value.shape)} into a tensor of shape "
                    f"{tuple(target.shape)}. Use the operator without the underscore, or an `out` of the right shape."
                )
            if value.dtype != target.dtype:
                with self:
                    value = value.to(target.dtype)
            self._assign(target, value)
        if result is not None:
            return result
        return groups[0] if len(func._schema.returns) == 1 else tuple(groups)

    def _reshape(self, func: Callable, args: tuple, kwargs: dict) -> torch.Tensor:
        """An operator that changes a tensor's shape in place. Python code that holds the tensor can't be served, but
        PyTorch's own C++ functions (quantile, stft) do it to their temporaries, of which nobody else knows. There the
        C++ handle is given to a new view, and the old Python object, which derivative rules may hold, stays as it was.
        """
        x, name = args[0], func._schema.name.split("::")[1]
        from_python = x._use_count() < 4 or name in sys._getframe(2).f_back.f_code.co_names
        if name not in _VIEWS_IN_PLACE or self._made not in x.__dict__ or from_python:
            raise CaptureError(
                f"{user_line()}: {name} changes a tensor's shape in place, which a graph of pure operators can't "
                f"express. Bind the result of the operator without the underscore to a new name instead."
            )
        packet = getattr(getattr(torch.ops, func.namespace), name.removesuffix("_"))
        with self:
            new = packet(*args, **kwargs)
        with _disable_current_modes():
            old = x.detach()
            torch._C._swap_tensor_impl(x, new)
            new.set_(x)
            x.set_(old)
        return new

    def _assign(self, x: torch.Tensor, value: torch.Tensor) -> None:
        link = x.__dict__.get(self._made)
        if self._paused is not None and link is None and self.key in self.now(x).__dict__:
            raise DifferentiationError(
                f"{user_line()}: a function with a derivative rule of its own, or a checkpointed one, writes in place to a "
                f"differentiated tensor of shape {tuple(x.shape)} from outside. Use the operator without the underscore."
            )
        if link is not None:
            with self:
                base = scatter(link, self.now(link.base), value)
            self._assign(link.base, base)
        elif self._now in x.__dict__:
            self._assign(x.__dict__[self._now], value)
        else:
            if self._made not in x.__dict__:
                self.check_external_write(x)
            x.__dict__[self._now] = value
            self._written[id(x)] = weakref.ref(x)

    def check_external_write(self, x: torch.Tensor) -> None:
        """Called at the first write to a tensor that wasn't made inside. Subclasses may refuse."""


def _any_complex(args: Any) -> bool:
    for a in args:
        if isinstance(a, torch.Tensor):
            if a.is_complex():
                return True
        elif isinstance(a, (list, tuple)) and a and isinstance(a[0], torch.Tensor) and _any_complex(a):
            return True
    return False


def _lazy_conjugates() -> Any:
    """Let the dispatcher resolve lazily conjugated tensors. It doesn't inside a dispatch mode's handler, so that what
    is called there (linalg.pinv of a complex matrix, say) would silently compute with unconjugated numbers."""
    key = torch._C.DispatchKey
    excluded = torch._C._dispatch_tls_local_exclude_set().remove(key.Conjugate).remove(key.Negative)
    return torch._C._ForceDispatchKeyGuard(torch._C._dispatch_tls_local_include_set(), excluded)


@dataclass(frozen=True)
class Traits:
    """What the tracer needs to know of an operator."""

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
    passive = func.namespace == "prim" or not any("Tensor" in str(r.type) for r in schema.returns) and not written
    composite = func.namespace != "prim" and torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd")
    passive = passive and torch.Tag.data_dependent_output not in func.tags
    makes_complex = any(word in func._schema.name for word in ("fft", "eig", "complex", "polar"))
    return Traits(tuple(written), is_view, passive, composite, makes_complex)


# In-place operators whose functional twin has another name or overload.
_TWINS: dict[str, Any] = {
    "aten::bernoulli_.float": lambda x, p=0.5, **kwargs: aten.bernoulli.p(x, p, **kwargs),
    "aten::normal_": aten.normal_functional.default,
    "aten::_native_batch_norm_legit": aten._native_batch_norm_legit_functional.default,
    "aten::_batch_norm_with_update": aten._batch_norm_with_update_functional.default,
    "aten::rrelu_with_noise": aten.rrelu_with_noise_functional.default,
    "aten::rrelu_with_noise_": aten.rrelu_with_noise_functional.default,
    "aten::pow_.Scalar": aten.pow.Tensor_Scalar,
    "aten::pow_.Tensor": aten.pow.Tensor_Tensor,
    "aten::polygamma_": lambda x, n: aten.polygamma.default(n, x),
    "aten::conj_physical_": aten._conj_physical.default,
}
_VIEWS_IN_PLACE = {"t_", "transpose_", "squeeze_", "unsqueeze_", "swapaxes_"}
_REFUSED = _VIEWS_IN_PLACE | {"resize_", "resize_as_", "set_", "as_strided_"}


def _functional(func: Any, args: tuple, kwargs: dict, count: int) -> tuple[list[torch.Tensor], Any]:
    """The new values of the `count` written tensors, computed without writing, and what the operator returns if that
    isn't the written tensors themselves."""
    name, overload = func._schema.name.split("::")[1], func._schema.overload_name
    twin = _TWINS.get(func._schema.name + (f".{overload}" if overload else ""))
    written = {name for name, _ in operator_traits(func).written}
    if twin is None:
        namespace = getattr(torch.ops, func.namespace)
        packet = getattr(namespace, name.removesuffix("_"), None)
        if written & {a.name for a in func._schema.arguments if a.is_out}:  # mm.out -> mm, sum.IntList_out -> sum.dim_IntList
            kwargs = {k: v for k, v in kwargs.items() if k not in written}
            new = packet(*args, **kwargs)
            return (list(new) if isinstance(new, (tuple, list)) else [new]), None
        twin = getattr(packet, overload or "default", None) if name.endswith("_") else None
    if twin is None:
        raise CaptureError(
            f"{user_line()}: {func} writes in place and has no functional twin. Use an operator that returns a new "
            f"tensor, or wrap the code in a torch.library custom operator that declares no mutation."
        )
    new = twin(*args, **kwargs)
    outputs = list(new) if isinstance(new, (tuple, list)) else [new]
    if outputs and isinstance(outputs[0], list):  # a foreach operator returns a list for each written list
        outputs = [t for group in outputs for t in group]
    if len(outputs) > count:  # a functional twin returns the results, then the new values
        rest = outputs[:-count]
        return outputs[-count:], rest[0] if len(rest) == 1 else tuple(rest)
    return outputs, None


def scatter(link: Link, base: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """`base` with the elements that the view `link` shows replaced by `value`: the inverse of a view."""
    func, args, kwargs, index = link.func, link.args, link.kwargs, link.index
    packet = func.overloadpacket
    if packet in _RESHAPES:
        return value.reshape(base.shape)
    if packet is aten.slice:
        return aten.slice_scatter(base, value, *args, **kwargs)
    if packet is aten.select:
        return aten.select_scatter(base, value, *args)
    if packet is aten.diagonal:
        return aten.diagonal_scatter(base, value, *args, **kwargs)
    if packet is aten.as_strided:
        return aten.as_strided_scatter(base, value, *args)
    if packet is aten.t:
        return value.t()
    if packet is aten.transpose:
        return value.transpose(*args)
    if packet is aten.permute:
        dims = [d % base.dim() for d in args[0]]
        return value.permute([dims.index(i) for i in range(len(dims))])
    if packet is aten.unbind:
        return aten.select_scatter(base, value, args[0] if args else 0, index)
    if packet in (aten.split, aten.split_with_sizes):
        dim = args[1] if len(args) > 1 else kwargs.get("dim", 0)
        sizes = args[0]
        start = index * sizes if isinstance(sizes, int) else sum(sizes[:index])
        return aten.slice_scatter(base, value, dim, start, start + value.shape[dim])
    if packet is aten.view_as_real:
        return torch.view_as_complex(value)
    if packet is aten.view_as_complex:
        return torch.view_as_real(value)
    if packet is aten._conj:
        return value.conj()
    raise CaptureError(
        f"{user_line()}: an in-place write through a view made by {func} can't be expressed as a pure operator. "
        f"Write to the tensor itself, or build a new tensor."
    )


_RESHAPES = {
    aten.view, aten._unsafe_view, aten._reshape_alias, aten.alias, aten.detach, aten.squeeze, aten.unsqueeze,
    aten.lift_fresh,
}  # fmt: skip
