"""`torch.autograd.Function` inside our transforms: its `backward` (and `jvp`, if it has one) is the rule.

To a dispatch mode a Function is just the operators of its `forward`, so that `apply` is replaced, once for the process, by
one that looks whether a transform is at work. As in torch.autograd, every derivative, also of a derivative, uses `backward`:
higher ones differentiate it, with what it saved of arguments and results followed and the rest constant.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch.autograd.function import (
    FunctionCtx,
    _is_setup_context_defined,
    _SingleLevelFunction,
    once_differentiable,
)
from torch.utils.checkpoint import CheckpointFunction

from ..errors import DifferentiationError
from ..graph.source import user_line
from ..graph.tree import tree_flatten
from .checkpoint import checkpoint
from .custom import all_differentiating, custom_vjp, meaning, plain, refuse_closure, zeros
from .forward import Forward
from .tape import Tape, differentiable
from .transforms import vjp

_ONCE = once_differentiable(lambda ctx: None).__code__
_apply = torch._C._FunctionBase.__dict__["apply"]


def apply(cls: type, *args: Any, **kwargs: Any) -> Any:
    """In place of PyTorch's: the same where no transform differentiates an argument."""
    if not torch._C._len_torch_dispatch_stack():
        return _apply.__get__(None, cls)(*args, **kwargs)
    if cls is CheckpointFunction:  # torch.utils.checkpoint: its backward would ask torch.autograd
        run, _, *rest = args
        return checkpoint(run)(*rest)
    tracers = all_differentiating(args)
    if not tracers:
        return plain(_whole(cls), partial(_apply.__get__(None, cls), **kwargs), args)
    return _Call(cls, meaning(tracers[-1], args), tracers).results()


_SingleLevelFunction.apply = classmethod(apply)


class _Call:
    """One application: `forward` runs once, and each tracer, the outermost first, gets its derivative."""

    def __init__(self, cls: type, args: tuple, tracers: list[Tape | Forward]):
        self.cls, self.args, self.tracers = cls, args, tracers
        self.ctx = ctx = FunctionCtx()
        ctx.needs_input_grad = tuple(any(t.key in getattr(a, "__dict__", ()) for t in tracers) for a in args)
        inputs = tree_flatten(args)[0]
        with ExitStack() as stack:
            read = [stack.enter_context(t.paused()) for t in tracers]
            if _is_setup_context_defined(cls.setup_context):
                out = cls.forward(*args)
                cls.setup_context(ctx, args, out)
            else:
                out = cls.forward(ctx, *args)
        for tensors in read:
            refuse_closure(cls.__name__, inputs, tensors)
        if getattr(ctx, "dirty_tensors", None):
            raise DifferentiationError(
                f"{user_line()}: {cls.__name__} writes in place to its arguments (mark_dirty), which a rule can't follow. "
                f"Return a new tensor."
            )
        self.single = isinstance(out, torch.Tensor)
        self.made = [out] if self.single else list(out)
        self.like = [(y.shape, y.dtype, y.device) if isinstance(y, torch.Tensor) else None for y in self.made]
        fixed = [id(x) for x in getattr(ctx, "non_differentiable", None) or ()]
        self.at = [i for i, y in enumerate(self.made) if differentiable(y) and id(y) not in fixed]
        self.saved = tuple(getattr(ctx, "to_save", None) or getattr(ctx, "saved_for_forward", None) or ())
        ctx.to_save = ctx.saved_for_forward = ctx.non_differentiable = None

    def results(self) -> Any:
        outputs, made, saved = list(self.made), self.made, self.saved
        self.made = self.saved = None
        for tracer in self.tracers:
            # To the tracers outside this one, a result that was saved is what they know as the result.
            known = {id(y): x for y, x in zip(made, outputs)}
            context = partial(self.context, tuple(known.get(id(x), x) for x in saved))
            moved = (self._push if isinstance(tracer, Forward) else self._record)(tracer, outputs, context)
            for i, y in zip(self.at, moved):
                outputs[i] = y
        return outputs[0] if self.single else tuple(outputs)

    def context(self, saved: tuple) -> FunctionCtx:
        self.ctx.saved_tensors = saved
        return self.ctx

    def backward(self, context: Callable, gs: Sequence) -> list:
        """Cotangents of the arguments, from those of the outputs at `self.at` (None: nothing arrives)."""
        filled: list = [None] * len(self.like)
        for i, g in zip(self.at, gs):
            filled[i] = g
        if getattr(self.ctx, "materialize_grads", True):
            filled = [zeros(k) if g is None and k else g for g, k in zip(filled, self.like)]
        rule = self.cls.backward if self.cls.backward is not torch.autograd.Function.backward else self.cls.vjp
        if getattr(rule, "__code__", None) is _ONCE and all_differentiating((gs, context().saved_tensors)):
            raise DifferentiationError(
                f"{user_line()}: a second derivative through {self.cls.__name__}, whose backward is marked "
                f"once_differentiable. Write the backward in differentiable operators, and leave the mark out."
            )
        back = rule(context(), *filled)
        back = list(back) if isinstance(back, (tuple, list)) else [back]
        count = len(self.args)
        if len(back) < count or any(b is not None for b in back[count:]):
            raise DifferentiationError(
                f"{self.cls.__name__}.backward returned {len(back)} gradients for {count} arguments of forward; expected one "
                f"for each (None for none)."
            )
        for g, x in zip(back, self.args):
            if g is not None and isinstance(x, torch.Tensor) and not _broadcasts(x.shape, g.shape):
                raise DifferentiationError(
                    f"{self.cls.__name__}.backward returned a gradient of shape {tuple(g.shape)} for an argument of shape "
                    f"{tuple(x.shape)}."
                )
        return back[:count]

    def _record(self, tape: Tape, outputs: list, context: Callable) -> list:
        pull = lambda gs: self.backward(context, gs)
        return tape.attach([outputs[i] for i in self.at], self.args, pull, self.cls.__name__)

    def _push(self, forward: Forward, outputs: list, context: Callable) -> list:
        with forward.paused():
            tangents = [forward.tangent(a) if isinstance(a, torch.Tensor) else None for a in self.args]
            if self.cls.jvp is not torch.autograd.Function.jvp:
                moved = self.cls.jvp(context(), *tangents)
                moved = [moved] if self.single else list(moved)
                moved = [moved[i] for i in self.at]
            else:  # backward is linear in the cotangents: its transpose is the derivative
                follow = [i for i, t in enumerate(tangents) if t is not None]

                def back(*gs: torch.Tensor) -> list:
                    found = self.backward(context, gs)
                    return [torch.zeros_like(self.args[i]) if found[i] is None else found[i] for i in follow]

                moved = vjp(back, *[torch.zeros_like(outputs[i]) for i in self.at])[1]([tangents[i] for i in follow])
            aliases = [torch.ops.aten.alias.default(outputs[i]) for i in self.at]
        for y, t in zip(aliases, moved):
            if t is not None:
                y.__dict__[forward.key] = t
        return aliases


def _whole(cls: type) -> custom_vjp:
    """The Function as one that vmap can batch."""
    function = custom_vjp(_apply.__get__(None, cls))
    function.__name__ = cls.__name__

    def fwd(*args: Any) -> tuple:
        call, out = _Call(cls, args, []), cls.apply(*args)  # apply: to transforms further out, the result has the rule too
        known = {id(y): x for y, x in zip(call.made, [out] if call.single else out)}
        saved = tuple(known.get(id(x), x) for x in call.saved)
        call.made = call.saved = None
        return out, (saved, call)

    def bwd(residuals: tuple, g: Any) -> tuple:
        saved, call = residuals
        gs = [g] if call.single else list(g)
        return tuple(call.backward(partial(call.context, saved), [gs[i] for i in call.at]))

    function.defvjp(fwd, bwd)
    return function


def _broadcasts(shape: torch.Size, to: torch.Size) -> bool:
    try:
        return torch.broadcast_shapes(shape, to) == to
    except RuntimeError:
        return False
