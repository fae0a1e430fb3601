"""Honouring `torch.no_grad()` and `detach_()` inside differentiated functions.

The transforms turn torch.autograd off, so that a user's `no_grad` within them turns off what is off already and PyTorch
can't tell us. Its context managers (no_grad, enable_grad, set_grad_enabled, inference_mode) are therefore extended, once
for the process, to note what the user asked for; what they do for torch.autograd stays as it is.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import wraps
from typing import Any

import torch
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from .switched_off import SwitchedOff


class _State(threading.local):
    off = False
    """Is what runs now constant to the innermost derivative, by the user's no_grad?"""


state = _State()
_fast_attention = SwitchedOff(torch.backends.mha.get_fastpath_enabled, torch.backends.mha.set_fastpath_enabled)


@contextmanager
def differentiating() -> Iterator[None]:
    """Around a function that is being differentiated: torch.autograd takes no part, and a `no_grad` outside doesn't reach
    in. To the derivatives that were being taken outside of such a `no_grad`, all of this is constant (as to torch.func).
    nn.MultiheadAttention's fast path, which nobody can differentiate, isn't taken."""
    before, enabled = state.off, torch.is_grad_enabled()
    with ExitStack() as stack:
        if before:
            for mode in _get_current_dispatch_mode_stack():
                if hasattr(mode, "constant"):
                    stack.enter_context(mode.constant())
        state.off = False
        torch._C._set_grad_enabled(False)
        stack.enter_context(_fast_attention)
        try:
            yield
        finally:
            state.off = before
            torch._C._set_grad_enabled(enabled)


class no_autograd:
    """Turns torch.autograd off around our own operations. Unlike torch.no_grad it says nothing of our derivatives."""

    __slots__ = ("enabled",)

    def __enter__(self) -> None:
        self.enabled = torch.is_grad_enabled()
        torch._C._set_grad_enabled(False)

    def __exit__(self, *error: Any) -> None:
        torch._C._set_grad_enabled(self.enabled)


@contextmanager
def following() -> Iterator[None]:
    """Within, the user's no_grad has no effect on derivatives."""
    before, state.off = state.off, False
    try:
        yield
    finally:
        state.off = before


def _extend(cls: type, off: Callable[[Any], bool]) -> None:
    """Let a context manager note `off(self)` while it is entered."""
    enter, leave = cls.__enter__, cls.__exit__

    @wraps(enter)
    def entered(self: Any) -> Any:
        if not hasattr(self, "_nf_before"):
            self._nf_before = state.off
        out = enter(self)
        state.off = off(self)
        return out

    @wraps(leave)
    def left(self: Any, *error: Any) -> Any:
        out = leave(self, *error)
        state.off = self.__dict__.pop("_nf_before", False)
        return out

    cls.__enter__, cls.__exit__ = entered, left


def _extend_call(cls: Any) -> None:
    """`torch.set_grad_enabled(False)` has an effect as soon as it is made; made as a decorator, it takes it back."""
    init, call = cls.__init__, cls.__call__

    @wraps(init)
    def made(self: Any, mode: bool) -> None:
        self._nf_before = state.off
        init(self, mode)
        state.off = not mode

    @wraps(call)
    def decorated(self: Any, f: Callable) -> Callable:
        state.off = self._nf_before
        return call(self, f)

    cls.__init__, cls.__call__ = made, decorated


_extend(torch.no_grad, lambda self: True)
_extend(torch.enable_grad, lambda self: False)
_extend(torch.set_grad_enabled, lambda self: not self.mode)
_extend(torch.inference_mode, lambda self: self.mode)
_extend_call(torch.set_grad_enabled)


def _extend_detach() -> None:
    """PyTorch doesn't dispatch `detach_`, which concerns its own autograd alone, to modes; to ours it matters too."""
    detach = torch.Tensor.detach_
    views = torch._C.DispatchKeySet(torch._C.DispatchKey.ADInplaceOrView)

    @wraps(detach)
    def detached(self: torch.Tensor) -> torch.Tensor:
        if torch._C._len_torch_dispatch_stack():
            with torch._C._AutoDispatchBelowAutograd(), torch._C._ExcludeDispatchKeyGuard(views):
                return detach(self)
        return detach(self)

    torch.Tensor.detach_ = detached


_extend_detach()
