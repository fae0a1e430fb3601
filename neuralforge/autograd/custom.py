"""Derivatives of the user's own making: `custom_vjp`, `custom_jvp` (after JAX), and opaque functions as operators.

The innermost transform that differentiates the call uses the custom rule; the transforms around it see the operators
inside the rule, so that higher derivatives follow from it.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Sequence
from functools import update_wrapper
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import _disable_current_modes, _get_current_dispatch_mode_stack

from ..errors import DifferentiationError
from ..graph import gradient_mode
from ..graph.capture import Capture
from ..graph.source import user_line
from ..graph.tracer import Tracer
from ..graph.tree import leaves_like, tree_flatten, tree_map, tree_unflatten
from .forward import Forward
from .tape import Tape, differentiable
from .transforms import vjp


class custom_vjp:
    """A function with its own reverse-mode rule:

        @nf.custom_vjp
        def clip_gradient(x): return x

        clip_gradient.defvjp(lambda x: (x, None), lambda residuals, g: (g.clamp(-1, 1),))

    `fwd(*args) -> (output, residuals)` and `bwd(residuals, cotangent) -> tuple` with a cotangent (or None) for each
    argument, structured like it. Arguments, output and residuals are pytrees. Second derivatives go through `fwd` and
    `bwd`; for a function that can't be differentiated otherwise, let `fwd` call the custom_vjp itself (`lambda x: (f(x), x)`),
    and give what `bwd` calls a rule too. Raises DifferentiationError for forward mode, which has no rule here, and for a function that closes over a
    differentiated tensor, which the rule can't give a cotangent.
    """

    def __init__(self, f: Callable):
        update_wrapper(self, f)
        self.__name__ = name_of(f)
        self.f = f
        self.fwd: Callable | None = None
        self.bwd: Callable | None = None

    def defvjp(self, fwd: Callable, bwd: Callable) -> None:
        self.fwd, self.bwd = fwd, bwd

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        args = positional(self.f, args, kwargs)
        if self.fwd is None:
            raise DifferentiationError(f"{user_line()}: {self.__name__} has no rule yet; give it one with .defvjp(fwd, bwd).")
        tracer = differentiating(args)
        if tracer is None:
            return plain(self, self.f, args)
        if isinstance(tracer, Forward):
            raise DifferentiationError(
                f"{user_line()}: forward mode through {self.__name__}, which has a custom reverse rule only. Use "
                f"nf.custom_jvp, which serves both modes."
            )
        args = meaning(tracer, args)
        inputs, in_tree = tree_flatten(args)
        with tracer.paused() as read:
            out, residuals = self.fwd(*args)
            residuals = meaning(tracer, residuals)
        refuse_closure(self.__name__, inputs, read)
        outputs, out_tree = tree_flatten(out)
        like = [(y.shape, y.dtype, y.device) if isinstance(y, torch.Tensor) else None for y in outputs]
        line = user_line()

        def pull(gs: list) -> list:
            filled = [zeros(k) if g is None and k else g for g, k in zip(gs, like)]
            back = self.bwd(residuals, tree_unflatten(filled, out_tree))
            return self._cotangents(back, args, line)

        return tree_unflatten(tracer.attach(outputs, inputs, pull, self.__name__), out_tree)

    def batched(self, vmap: Callable, axes: tuple) -> custom_vjp:
        """The function over an axis of its arguments (`axes`: 0, or None for what isn't batched), with the rule likewise."""
        function = custom_vjp(vmap(self.f, axes))
        function.__name__ = self.__name__

        def bwd(residuals: Any, g: Any) -> tuple:
            back = vmap(self.bwd, (batch_axes(residuals), batch_axes(g)))(residuals, g)
            if not isinstance(back, (tuple, list)) or len(back) != len(axes):
                return back  # refused
            reduced = []
            for b, a in zip(back, axes):
                flat, tree = tree_flatten(b)
                spread = [None] * len(flat) if b is None else tree_flatten(a, is_leaf=lambda x: x is None)[0]
                reduced.append(tree_unflatten([g.sum(0) if s is None and g is not None else g for g, s in zip(flat, spread)], tree))
            return tuple(reduced)

        function.defvjp(vmap(self.fwd, axes), bwd)
        return function

    def _cotangents(self, back: Any, args: tuple, line: str) -> list:
        if not isinstance(back, (tuple, list)) or len(back) != len(args):
            raise DifferentiationError(
                f"{line}: the backward rule of {self.__name__} must return a tuple of {len(args)} cotangents, one for each "
                f"argument (None for none), and returned {type(back).__name__}"
                + (f" of {len(back)}." if isinstance(back, (tuple, list)) else ".")
            )
        flat: list = []
        for cotangent, arg in zip(back, args):
            leaves, tree = tree_flatten(arg)
            try:
                given = [None] * len(leaves) if cotangent is None else leaves_like(tree, cotangent)
            except ValueError as e:
                raise DifferentiationError(
                    f"{line}: the backward rule of {self.__name__} returned a cotangent of another structure than its argument's: {e}"
                ) from e
            for g, x in zip(given, leaves):
                if g is not None and isinstance(x, torch.Tensor) and g.shape != x.shape:
                    raise DifferentiationError(
                        f"{line}: the backward rule of {self.__name__} returned a cotangent of shape {tuple(g.shape)} for an "
                        f"argument of shape {tuple(x.shape)}."
                    )
            flat += given
        return flat


class custom_jvp:
    """A function with its own forward-mode rule, `fn(primals, tangents) -> (output, output tangent)`, linear in the
    tangents:

        @nf.custom_jvp
        def f(x): ...

        f.defjvp(lambda primals, tangents: (f(*primals), ...))

    Reverse mode transposes the rule. Raises DifferentiationError for a function that closes over a differentiated
    tensor.
    """

    def __init__(self, f: Callable):
        update_wrapper(self, f)
        self.__name__ = name_of(f)
        self.f = f
        self.rule: Callable | None = None

    def defjvp(self, rule: Callable) -> None:
        self.rule = rule

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        args = positional(self.f, args, kwargs)
        if self.rule is None:
            raise DifferentiationError(f"{user_line()}: {self.__name__} has no rule yet; give it one with .defjvp(rule).")
        tracer = differentiating(args)
        if tracer is None:
            return plain(self, self.f, args)
        args = meaning(tracer, args)
        inputs, in_tree = tree_flatten(args)
        if isinstance(tracer, Forward):
            with tracer.paused() as read:
                out, moved = self.rule(args, tree_map(lambda x: _tangent(tracer, x), args))
                outputs, out_tree = tree_flatten(out)
                outputs = [torch.ops.aten.alias.default(y) if isinstance(y, torch.Tensor) else y for y in outputs]
                tangents = self._tangents(outputs, moved, out_tree)
            refuse_closure(self.__name__, inputs, read)
            for y, t in zip(outputs, tangents):
                if t is not None and differentiable(y):
                    y.__dict__[tracer.key] = meaning(tracer, t)
            return tree_unflatten(outputs, out_tree)
        with tracer.paused() as read:
            outputs, out_tree = tree_flatten(self(*args))  # not self.f: transforms further out use the rule too

            def along(*tangents: torch.Tensor) -> list:
                left = iter(tangents)
                moved = self.rule(args, tree_map(lambda x: next(left) if differentiable(x) else None, args))[1]
                return self._tangents(outputs, moved, out_tree)

            found, transpose = vjp(along, *[torch.zeros_like(x) for x in inputs if differentiable(x)])
        refuse_closure(self.__name__, inputs, read)

        def pull(gs: list) -> list:
            filled = [torch.zeros_like(t) if g is None and t is not None else g for g, t in zip(gs, found)]
            back = iter(transpose(filled))
            return [next(back) if differentiable(x) else None for x in inputs]

        return tree_unflatten(tracer.attach(outputs, inputs, pull, self.__name__), out_tree)

    def batched(self, vmap: Callable, axes: tuple) -> custom_jvp:
        """See custom_vjp.batched."""
        function = custom_jvp(vmap(self.f, axes))
        function.__name__ = self.__name__

        def rule(primals: tuple, tangents: tuple) -> tuple:
            still = lambda a, t: a if isinstance(t, torch.Tensor) else None
            flat, tree = tree_flatten(axes, is_leaf=lambda x: x is None)
            along = tree_unflatten([still(a, t) for a, t in zip(flat, tree_flatten(tangents)[0])], tree)
            return vmap(self.rule, (axes, along))(primals, tangents)

        function.defjvp(rule)
        return function

    def _tangents(self, outputs: list, moved: Any, out_tree: Any) -> list:
        """The tangent of each output leaf; None for what doesn't move."""
        try:
            flat = leaves_like(out_tree, moved)
        except ValueError as e:
            raise DifferentiationError(
                f"{user_line()}: the rule of {self.__name__} returned tangents of another structure than its outputs': {e}"
            ) from e
        for y, t in zip(outputs, flat):
            if isinstance(t, torch.Tensor) and t.shape != y.shape:
                raise DifferentiationError(
                    f"{user_line()}: the rule of {self.__name__} returned a tangent of shape {tuple(t.shape)} for an output of "
                    f"shape {tuple(y.shape)}."
                )
        return [t if isinstance(t, torch.Tensor) and differentiable(y) else None for y, t in zip(outputs, flat)]


def positional(f: Callable, args: tuple, kwargs: dict) -> tuple:
    """The arguments of a call of `f`, all by position."""
    if not kwargs:
        return args
    bound = inspect.signature(f).bind(*args, **kwargs)
    if bound.kwargs:
        raise DifferentiationError(
            f"{user_line()}: {name_of(f)} has a derivative rule of its own, which gets its arguments by position; "
            f"{', '.join(bound.kwargs)} can only be given by keyword."
        )
    return bound.args


def zeros(like: tuple) -> torch.Tensor:
    """Of a shape, dtype and device."""
    return torch.zeros(like[0], dtype=like[1], device=like[2])


def plain(function: Any, f: Callable, args: tuple) -> Any:
    """`f(*args)`, nothing of which is differentiated here. Inside vmap, a transform further out may want to, so that
    `function`, which has the derivative, stays whole."""
    for mode in reversed(_get_current_dispatch_mode_stack()):
        if isinstance(mode, Capture) and mode.whole and mode._paused is None and not gradient_mode.state.off:
            return mode.record_whole(function, f, args)
    return f(*args)


def _tangent(tracer: Forward, x: Any) -> Any:
    t = tracer.tangent(x)
    return torch.zeros_like(x) if t is None and differentiable(x) else t


def batch_axes(tree: Any) -> Any:
    """For vmap's in_axes: axis 0 of every tensor."""
    return tree_map(lambda x: 0 if isinstance(x, torch.Tensor) and x.dim() else None, tree)


def name_of(f: Callable) -> str:
    """What to call a function, module or partial in a message."""
    return getattr(f, "__name__", type(f).__name__)


def meaning(tracer: Tracer, tree: Any) -> Any:
    """The tensors of a tree as `tracer` knows them: after the writes seen by it and by the tracers inside it."""

    def now(x: Any) -> Any:
        for mode in reversed(_get_current_dispatch_mode_stack()):
            if isinstance(mode, Tracer):
                x = mode.now(x)
                if mode is tracer:
                    break
        return x

    return tree_map(now, tree)


def refuse_closure(name: str, inputs: list, read: dict[int, torch.Tensor]) -> None:
    """Raise if a tracked tensor other than `inputs` was read."""
    known = {id(x) for x in inputs}
    for x in read.values():
        if id(x) not in known:
            raise DifferentiationError(
                f"{user_line()}: {name} has a derivative rule of its own and closes over a differentiated tensor of shape "
                f"{tuple(x.shape)}, for which the rule gives nothing. Pass it as an argument, or wrap it in "
                f"nf.stop_gradient."
            )


def differentiating(args: Any) -> Tape | Forward | None:
    """The innermost tape or forward mode in which any of the tensors among `args` is tracked."""
    found = all_differentiating(args)
    return found[-1] if found else None


def all_differentiating(args: Any) -> list[Tape | Forward]:
    """Those tapes and forward modes, the outermost first."""
    modes = [m for m in _get_current_dispatch_mode_stack() if isinstance(m, (Tape, Forward)) and m._paused is None]
    if not modes or gradient_mode.state.off:
        return []
    tensors = [x for x in tree_flatten(args)[0] if isinstance(x, torch.Tensor)]
    return [mode for mode in modes if any(mode.key in meaning(mode, x).__dict__ for x in tensors)]


_numbers = itertools.count()


def opaque(f: Callable, shape: Callable) -> Callable:
    """A function that PyTorch can't see into (NumPy, C, CUDA called by pointer) as one operator, so that it can be
    captured, jitted and given a derivative with custom_vjp or custom_jvp. `f` takes tensors and returns a tensor or a
    tuple of them; `shape`, called with the same arguments as fake tensors, returns empty tensors of the results' shapes
    and dtypes. Under vmap it is called for one example after another.

    Raises DifferentiationError for an argument that isn't a tensor, and where `f` returns something else than `shape` says.
    """
    name = f"opaque_{name_of(f).strip('<>')}_{next(_numbers)}"
    promised: dict[tuple, tuple[bool, list]] = {}

    def promise(inputs: Sequence[torch.Tensor]) -> tuple[bool, list]:
        """For arguments of these shapes and dtypes: is the result a tensor by itself, and the results' shapes and dtypes."""
        kinds = tuple([(x.shape, x.dtype) for x in inputs])
        if kinds not in promised:
            with _disable_current_modes(), FakeTensorMode():
                out = shape(*[torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=t.device) for t in inputs])
            single = isinstance(out, torch.Tensor)
            promised[kinds] = single, [(y.shape, y.dtype) for y in ([out] if single else out)]
        return promised[kinds]

    def call(inputs: list[torch.Tensor]) -> list[torch.Tensor]:
        _, expected = promise(inputs)
        out = f(*inputs)
        outputs = [out] if isinstance(out, torch.Tensor) else list(out)
        found = [(y.shape, y.dtype) if isinstance(y, torch.Tensor) else type(y).__name__ for y in outputs]
        if found != expected:
            raise DifferentiationError(
                f"{user_line()}: {name_of(f)} returned {_told(found)}, and its shape function says "
                f"{_told(expected)}. They must agree."
            )
        given = {x.untyped_storage()._cdata for x in inputs}
        return [y.clone() if y.untyped_storage()._cdata in given else y for y in outputs]

    def fake(inputs: list[torch.Tensor]) -> list[torch.Tensor]:
        out = shape(*inputs)
        return [out] if isinstance(out, torch.Tensor) else list(out)

    op = torch.library.custom_op(f"neuralforge_user::{name}", call, mutates_args=(), schema="(Tensor[] inputs) -> Tensor[]")
    op.register_fake(fake)

    def each(info: Any, in_dims: tuple, inputs: list[torch.Tensor]) -> tuple[list, list]:
        unbatched = [[x] * info.batch_size if d is None else x.unbind(d) for x, d in zip(inputs, in_dims[0])]
        rows = [op([x[i] for x in unbatched]) for i in range(info.batch_size)]
        return [torch.stack(column) for column in zip(*rows)], [0] * len(rows[0])

    op.register_vmap(each)

    def operator(*tensors: torch.Tensor) -> Any:
        for x in tensors:
            if not isinstance(x, torch.Tensor):
                raise DifferentiationError(
                    f"{user_line()}: {name_of(f)}, made an operator by nf.opaque, was given {x!r} ({type(x).__name__}); expected "
                    f"tensors. Bind other arguments beforehand, with functools.partial or a closure."
                )
        out = op(list(tensors))
        single, _ = promise(tensors)
        return out[0] if single else tuple(out)

    return update_wrapper(operator, f)


def _told(results: list) -> str:
    """Shapes and dtypes in words."""
    return ", ".join(f"{tuple(r[0])} {r[1]}" if isinstance(r, tuple) else str(r) for r in results)
