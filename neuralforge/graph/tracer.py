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
from contextlib import AbstractContextManager, contextmanager, nullcontext
from types import FrameType
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode_stack

from ..errors import CaptureError, DifferentiationError
from . import gradient_mode
from .in_place import (
    RESHAPING,
    UNDECLARED,
    VIEWS_IN_PLACE,
    Link,
    functional,
    hand_over,
    laid_out_like,
    scatter,
)
from .ir import map_tree
from .operators import Traits, operator_traits
from .source import user_line

aten = torch.ops.aten

_ids = itertools.count()


class Tracer(TorchDispatchMode):
    """Calls `record(func, args, kwargs)` for each pure operator. Usable once, as a context manager."""

    def __init__(self) -> None:
        self._written: dict[int, weakref.ref] = {}
        if torch._C._functorch.peek_interpreter_stack() is not None:
            raise CaptureError(
                f"{user_line()}: a transform of neuralforge inside one of torch.func, which hides its tensors from it. Use "
                f"nf.vmap, nf.grad, nf.jvp and so on outside too; the other way round, torch.func inside, works."
            )
        super().__init__()
        self.key = f"_nf{next(_ids)}"
        self._made = self.key + "made"  # attribute: None on tensors made inside, a Link on views
        self._now = self.key + "now"  # attribute: the tensor that a written tensor means
        self._by_parts = self.key + "parts"  # attribute: that tensor, if writes went through its `unsafe` parts only
        self.descents: list[Any] = []  # operators whose definitions are being followed just now
        self._paused: dict[int, torch.Tensor] | None = None
        self._last: tuple[int, ...] = ()
        """The tensor that was made last, if it is new and no view, and by which instruction. If that detaches it too, as torch.zeros and the like do within where
        somebody holds what they made, the result is what they made, and no view: nobody else knows the other."""

    def __del__(self) -> None:
        """Tensors from outside mean themselves again. (What they meant would be copied and pickled with them.)"""
        for x in self.live_writes():
            x.__dict__.pop(self._now, None)
            x.__dict__.pop(self._by_parts, None)

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

    def constant(self) -> AbstractContextManager:
        """Within, what is computed is constant to the derivative this tracer takes, if it takes one."""
        return nullcontext()

    def _pass_by(self, func: Callable, args: tuple, kwargs: dict) -> Any:
        def look(x: Any) -> None:
            if isinstance(x, torch.Tensor) and self.key in x.__dict__:
                self._paused[id(x)] = x

        if func is not aten.detach.default:
            map_tree(look, (args, kwargs))
        return func(*args, **kwargs)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        traits, caller = operator_traits(func), _caller(sys._getframe(1))
        here = id(caller), caller.f_lasti
        if traits.makes_complex or _any_complex(args):
            with lazy_conjugates():
                out = self._dispatch(func, traits, args, kwargs or {})
        else:
            out = self._dispatch(func, traits, args, kwargs or {})
        if isinstance(out, torch.Tensor):
            if func is aten.detach.default and (id(args[0]), *here) == self._last:
                out.__dict__[self._made] = None
            new = func is not aten.detach.default and out.__dict__.get(self._made) is None
            self._last = (id(out), *here) if new else ()
        return out

    def _dispatch(self, func: Callable, traits: Traits, args: tuple, kwargs: dict) -> Any:
        if traits.passive:
            return func(*args, **kwargs)
        if func in UNDECLARED:
            with self:
                return UNDECLARED[func](*args, **kwargs)
        if traits.written:
            if func._schema.name.split("::")[1] in RESHAPING:
                return self._reshape(func, args, kwargs)
            return self._write(func, args, kwargs)
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

    def note_view(self, x: torch.Tensor, link: Link) -> None:
        """Writes to `x`, which was made as `link` says, are writes to its base."""
        x.__dict__[self._made] = link

    def now(self, x: Any) -> Any:
        """The tensor that `x` means after the writes so far; anything that isn't a tensor unchanged."""
        if not isinstance(x, torch.Tensor):
            return x
        link = x.__dict__.get(self._made)
        if link is None:
            return self._latest(x)
        base = self.now(link.base)
        if base is link.base:
            return x
        seen = x.__dict__.get(self._now)
        if link.unsafe and base is link.base.__dict__.get(self._by_parts):
            return x if seen is None else seen[1]
        if seen is None or seen[0] is not base:
            paused, self._paused = self._paused, None  # a view of a tracked tensor is tracked
            with self, gradient_mode.following():
                seen = x.__dict__[self._now] = (base, link.replay(base))
            self._paused = paused
        return seen[1]

    def _latest(self, x: torch.Tensor) -> torch.Tensor:
        """What `x`, no view, means. A tensor written again and again means one that means another, and so on; the ways are cut short."""
        last = x
        while last.__dict__.get(self._made) is None and (meant := last.__dict__.get(self._now)) is not None:
            last = meant
        while x is not last:
            x.__dict__[self._now], x = last, x.__dict__[self._now]
        return last if last.__dict__.get(self._made) is None else self.now(last)

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

    def _write(self, func: Callable, args: tuple, kwargs: dict) -> Any:
        """An operator that writes to its arguments: compute the new values, then rebind the written tensors."""
        with self:
            written, result = functional(func, args, kwargs, self.now)
        for target, value in written:
            if value.shape != target.shape:
                raise CaptureError(
                    f"{user_line()}: {func} writes a result of shape {tuple(value.shape)} into a tensor of shape "
                    f"{tuple(target.shape)}. Use the operator without the underscore, or an `out` of the right shape."
                )
            if value.dtype != target.dtype:
                if not torch.can_cast(value.dtype, target.dtype):  # eagerly an error too
                    raise CaptureError(
                        f"{user_line()}: {func} writes a result of {value.dtype} into a tensor of {target.dtype}, which can't hold it. Use "
                        f"the operator without the underscore, or an `out` of that dtype."
                    )
                with self:
                    value = value.to(target.dtype)
            if func is aten.detach_.default:
                value.__dict__[self._made] = None  # no view of what it takes the place of
            self._assign(target, value)
        return result

    def _reshape(self, func: Callable, args: tuple, kwargs: dict) -> torch.Tensor:
        """An operator that changes a tensor's shape in place. Python code that holds the tensor can't be served, but
        PyTorch's own C++ functions (quantile, stft) do it to their temporaries, of which nobody else knows."""
        x, name = args[0], func._schema.name.split("::")[1]
        if name == "as_strided_" and _same_places_in_memory(x, *args[1:], **kwargs):
            return x
        from_python = x._use_count() < 4 or name in _caller(sys._getframe(3)).f_code.co_names
        if name not in VIEWS_IN_PLACE or self._made not in x.__dict__ or from_python:
            raise CaptureError(
                f"{user_line()}: {name} changes a tensor's shape in place, which a graph of pure operators can't "
                f"express. Bind the result of the operator without the underscore to a new name instead."
            )
        packet = getattr(getattr(torch.ops, func.namespace), name.removesuffix("_"))
        with self:
            new = packet(*args, **kwargs)
        hand_over(x, new)
        return new

    def _assign(self, x: torch.Tensor, value: torch.Tensor) -> None:
        link = x.__dict__.get(self._made)
        if self._paused is not None and link is None and self.key in self.now(x).__dict__:
            raise DifferentiationError(
                f"{user_line()}: a function with a derivative rule of its own, or a checkpointed one, writes in place to a "
                f"differentiated tensor of shape {tuple(x.shape)} from outside. Use the operator without the underscore."
            )
        if link is not None:
            before = self.now(link.base)
            with self:
                base = scatter(link, before, value)
                if base is not value and base.__dict__.get(self._made) is not None:
                    base.__dict__[self._made] = None  # it is read through what was written from now on
            if link.func is aten.detach.default:  # as for x.data, derivatives of what is detached pass by the write
                with self:
                    base, shown = aten.detach.default(base), aten.alias.default(value)
                base.__dict__[self._made] = None
                self._assign(link.base, self._same_places(link.base, base))
                base = self.now(link.base)
                shown.__dict__[self._made] = link._replace(base=base)
                x.__dict__[self._now] = base, shown
                return
            self._assign(link.base, base)
            if link.unsafe and (before is link.base or before is link.base.__dict__.get(self._by_parts)):
                base = link.base.__dict__[self._by_parts] = self.now(link.base)
                x.__dict__[self._now] = base, value
        elif self._now in x.__dict__:  # not replaced: there may be views of it
            self._assign(self._latest(x), value)
        else:
            if self._made not in x.__dict__:
                self.check_external_write(x)
            if gradient_mode.state.off:
                value = self._same_places(x, value)
            with self:
                laid = laid_out_like(x, value)
            if laid is not value:
                laid.__dict__[self._made] = None
            x.__dict__[self._now] = laid
            self._written[id(x)] = weakref.ref(x)

    def _same_places(self, x: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """The new value of a tensor written under no_grad: derivatives pass by the write, as in torch.autograd."""
        tracers = [self, *(m for m in _get_current_dispatch_mode_stack() if isinstance(m, Tracer))]
        places = {t.key: meant[t.key] for t in tracers if t.key in (meant := t.now(x).__dict__)}
        if not places:
            return value
        with self.paused():
            value = aten.alias.default(value)
        value.__dict__.update(places)
        return value

    def check_external_write(self, x: torch.Tensor) -> None:
        """Called at the first write to a tensor that wasn't made inside. Subclasses may refuse."""


def _caller(frame: FrameType) -> FrameType:
    """The frame of the program that called an operator, maybe through modes that stand between (`without_data.py`, a default device)."""
    while frame.f_code.co_name == "__torch_function__":
        frame = frame.f_back
    return frame


def _same_places_in_memory(x: torch.Tensor, size: list[int], stride: list[int], storage_offset: int | None = None) -> bool:
    """Do these say of `x` what holds already? Strides of dimensions of one element say nothing."""
    same = all(n == 1 or a == b for n, a, b in zip(size, stride, x.stride()))
    return list(x.shape) == list(size) and same and storage_offset in (None, x.storage_offset())


def _any_complex(args: Any) -> bool:
    for a in args:
        if isinstance(a, torch.Tensor):
            if a.is_complex():
                return True
        elif isinstance(a, (list, tuple)) and a and isinstance(a[0], torch.Tensor) and _any_complex(a):
            return True
    return False


def lazy_conjugates() -> Any:
    """Let the dispatcher resolve lazily conjugated tensors. It doesn't inside a dispatch mode's handler, so that what
    is called there (linalg.pinv of a complex matrix, say) would silently compute with unconjugated numbers."""
    key = torch._C.DispatchKey
    excluded = torch._C._dispatch_tls_local_exclude_set().remove(key.Conjugate).remove(key.Negative)
    return torch._C._ForceDispatchKeyGuard(torch._C._dispatch_tls_local_include_set(), excluded)
