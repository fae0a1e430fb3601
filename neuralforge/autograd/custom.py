"""Derivatives of the user's own making: `custom_vjp`, `custom_jvp` (after JAX), and opaque functions as operators.

The innermost transform that differentiates the call uses the custom rule; the transforms around it see the operators
inside the rule, so that higher derivatives follow from it.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import update_wrapper
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import _disable_current_modes, _get_current_dispatch_mode_stack
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from ..errors import DifferentiationError
from ..graph.source import user_line
from .forward import Forward
from .tape import Tape
from .transforms import vjp


class custom_vjp:
    """A function with its own reverse-mode rule:

        @nf.custom_vjp
        def clip_gradient(x): return x

        clip_gradient.defvjp(lambda x: (x, None), lambda residuals, g: (g.clamp(-1, 1),))

    `fwd(*args) -> (output, residuals)` and `bwd(residuals, cotangent) -> tuple` with a cotangent (or None) for each
    argument, structured like it. Arguments, output and residuals are pytrees. Second derivatives go through `fwd` and
    `bwd`. Forward mode has no rule here and raises DifferentiationError.
    """

    def __init__(self, f: Callable):
        update_wrapper(self, f)
        self.f = f
        self.fwd: Callable | None = None
        self.bwd: Callable | None = None

    def defvjp(self, fwd: Callable, bwd: Callable) -> None:
        self.fwd, self.bwd = fwd, bwd

    def __call__(self, *args: Any) -> Any:
        if self.fwd is None:
            raise DifferentiationError(f"{user_line()}: {self.f.__name__} has no rule yet; give it one with .defvjp(fwd, bwd).")
        tracer = differentiating(args)
        if tracer is None:
            return self.f(*args)
        if isinstance(tracer, Forward):
            raise DifferentiationError(
                f"{user_line()}: forward mode through {self.f.__name__}, which has a custom reverse rule only. Use "
                f"nf.custom_jvp, which serves both modes."
            )
        inputs, in_tree = tree_flatten(args)
        with tracer.paused():
            out, residuals = self.fwd(*args)
        outputs, out_tree = tree_flatten(out)
        like = [(y.shape, y.dtype, y.device) if isinstance(y, torch.Tensor) else None for y in outputs]

        def pull(gs: list) -> list:
            filled = [torch.zeros(k[0], dtype=k[1], device=k[2]) if g is None and k else g for g, k in zip(gs, like)]
            back = self.bwd(residuals, tree_unflatten(filled, out_tree))
            return self._cotangents(back, args, in_tree)

        return tree_unflatten(tracer.attach(outputs, inputs, pull, self.f.__name__), out_tree)

    def _cotangents(self, back: Any, args: tuple, in_tree: Any) -> list:
        if not isinstance(back, (tuple, list)) or len(back) != len(args):
            raise DifferentiationError(
                f"the backward rule of {self.f.__name__} must return a tuple of {len(args)} cotangents, one for each "
                f"argument (None for none), and returned {type(back).__name__}"
                + (f" of {len(back)}." if isinstance(back, (tuple, list)) else ".")
            )
        flat: list = []
        for cotangent, arg in zip(back, args):
            leaves, tree = tree_flatten(arg)
            given = [None] * len(leaves) if cotangent is None else tree_flatten(cotangent)[0]
            if len(given) != len(leaves):
                raise DifferentiationError(
                    f"the backward rule of {self.f.__name__} returned a cotangent of {len(given)} leaves for an argument of "
                    f"{len(leaves)}; they must have the same structure."
                )
            for g, x in zip(given, leaves):
                if g is not None and isinstance(x, torch.Tensor) and g.shape != x.shape:
                    raise DifferentiationError(
                        f"the backward rule of {self.f.__name__} returned a cotangent of shape {tuple(g.shape)} for an "
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

    Reverse mode transposes the rule.
    """

    def __init__(self, f: Callable):
        update_wrapper(self, f)
        self.f = f
        self.rule: Callable | None = None

    def defjvp(self, rule: Callable) -> None:
        self.rule = rule

    def __call__(self, *args: Any) -> Any:
        if self.rule is None:
            raise DifferentiationError(f"{user_line()}: {self.f.__name__} has no rule yet; give it one with .defjvp(rule).")
        tracer = differentiating(args)
        if tracer is None:
            return self.f(*args)
        if isinstance(tracer, Forward):
            tangents = tree_map(lambda x: _tangent(tracer, x), args)
            with tracer.paused():
                out, moved = self.rule(args, tangents)
                out = tree_map(lambda y: torch.ops.aten.alias.default(y) if isinstance(y, torch.Tensor) else y, out)
            for y, t in zip(tree_flatten(out)[0], tree_flatten(moved)[0]):
                if isinstance(y, torch.Tensor) and t is not None:
                    y.__dict__[tracer.key] = t
            return out
        inputs, _ = tree_flatten(args)
        with tracer.paused():
            zeros = tree_map(lambda x: torch.zeros_like(x) if _moves(x) else x, args)
            out = self.f(*args)
            moving = [x for x in tree_flatten(zeros)[0] if _moves(x)]

            def along(*tangents: torch.Tensor) -> Any:
                left = iter(tangents)
                return self.rule(args, tree_map(lambda x: next(left) if _moves(x) else x, args))[1]

            _, transpose = vjp(along, *moving)
        outputs, out_tree = tree_flatten(out)

        def pull(gs: list) -> list:
            filled = [torch.zeros_like(y) if g is None else g for g, y in zip(gs, outputs)]
            back = iter(transpose(tree_unflatten(filled, out_tree)))
            return [next(back) if _moves(x) else None for x in inputs]

        return tree_unflatten(tracer.attach(outputs, inputs, pull, self.f.__name__), out_tree)


def _moves(x: Any) -> bool:
    return isinstance(x, torch.Tensor) and (x.is_floating_point() or x.is_complex())


def _tangent(tracer: Forward, x: Any) -> Any:
    t = tracer.tangent(x)
    return torch.zeros_like(x) if t is None and _moves(x) else t


def differentiating(args: Any) -> Tape | Forward | None:
    """The innermost tape or forward mode in which any of the tensors among `args` is tracked."""
    tensors = [x for x in tree_flatten(args)[0] if isinstance(x, torch.Tensor)]
    for mode in reversed(_get_current_dispatch_mode_stack()):
        if isinstance(mode, (Tape, Forward)) and not mode._paused:
            if any(mode.key in mode.now(x).__dict__ for x in tensors):
                return mode
    return None


_numbers = itertools.count()


def opaque(f: Callable, shape: Callable) -> Callable:
    """A function that PyTorch can't see into (NumPy, C, CUDA called by pointer) as one operator, so that it can be
    captured, jitted and given a derivative with custom_vjp or custom_jvp. `f` takes tensors and returns a tensor or a
    tuple of them, new ones; `shape`, called with the same arguments as fake tensors, returns empty tensors of the
    results' shapes and dtypes."""
    name = f"opaque_{getattr(f, '__name__', 'function').strip('<>')}_{next(_numbers)}"
    single: list[bool] = []

    def call(inputs: list[torch.Tensor]) -> list[torch.Tensor]:
        out = f(*inputs)
        return [out] if isinstance(out, torch.Tensor) else list(out)

    def fake(inputs: list[torch.Tensor]) -> list[torch.Tensor]:
        out = shape(*inputs)
        return [out] if isinstance(out, torch.Tensor) else list(out)

    op = torch.library.custom_op(f"neuralforge_user::{name}", call, mutates_args=(), schema="(Tensor[] inputs) -> Tensor[]")
    op.register_fake(fake)

    def operator(*tensors: torch.Tensor) -> Any:
        out = op(list(tensors))
        if not single:
            with _disable_current_modes(), FakeTensorMode():
                fakes = [torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=t.device) for t in tensors]
                single.append(isinstance(shape(*fakes), torch.Tensor))
        return out[0] if single[0] else tuple(out)

    return update_wrapper(operator, f)
