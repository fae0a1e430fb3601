"""A jitted function: which compiled form a call needs, and the forms it has."""

from __future__ import annotations

import sys
from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import update_wrapper
from operator import attrgetter
from types import MethodType
from typing import Any

import torch
from torch import nn

from ..errors import CaptureError
from ..graph import Captured, capture
from ..graph.source import user_line
from ..graph.tree import tree_flatten
from ..kernels.native import build_ahead
from ..memory import Arena
from .compiled import Compiled
from .outside import Outside, alike, modules_met
from .signature import check_hashable, flatten, signature
from .torch_autograd import Differentiable, closes_over_grad

CACHE_SIZE = 64
"""Compiled forms that a jitted function keeps; the one not used for longest goes."""


@dataclass(eq=False)
class Form:
    """A compiled form, and what it depends on, for which alone it holds."""

    program: Any
    outside: Outside
    call: Call | None = None
    """What calls of it look like."""
    cuts: dict[Any, list[tuple[int, int, int]]] = field(default_factory=dict)
    """How to cut its results, for each pattern of padded lengths that it was tried with (`buckets.py`)."""


class Jit:
    """A function compiled for each combination of argument structure, shapes, dtypes, strides and static values; also of
    what else it may depend on: modules in training or not, autocast, the default dtype, the number of threads.

    Called inside another transform (`nf.grad`, `nf.jit`, ...) it simply runs its Python function, which that
    transform, torch.func's included, then follows. Called on tensors that require grad, or closing over such (a module's parameters), its outputs
    carry torch.autograd gradients.
    """

    def __init__(
        self, f: Callable, donate: tuple[int, ...], memory_budget: int | None = None, max_rewrites: int | None = None
    ):
        update_wrapper(self, f, updated=() if isinstance(f, nn.Module) else ("__dict__",))  # a module's are its layers, and not ours
        self.f = f
        self.donate = donate
        self.memory_budget, self.max_rewrites = memory_budget, max_rewrites
        self._arena = Arena()  # of all forms
        self._forms: OrderedDict[Any, list[Form]] = OrderedDict()
        self._last: Form | None = None

    def __get__(self, instance: Any, owner: type | None = None) -> Any:
        """As a method, it gets the instance as its first argument, if the function does."""
        return MethodType(self, instance) if instance is not None and hasattr(self.f, "__get__") else self

    def __reduce__(self) -> Any:
        """A copy, and what is unpickled elsewhere, compile for themselves. A decorated function goes by its name, as functions do."""
        name = getattr(self, "__qualname__", None)
        if name and getattr(sys.modules.get(self.__module__), name, None) is self:
            return name
        return Jit, (self.f, self.donate, self.memory_budget, self.max_rewrites)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if followed():
            return self.f(*args, **kwargs)
        flat = flatten((args, kwargs))
        last = self._last
        if last is not None and (tensors := last.call.tensors(*flat)) is not None and last.outside.holds():
            if not (torch.is_grad_enabled() and closes_over_grad(last.program)):
                return last.program(tensors)
        if torch.is_grad_enabled() and any([isinstance(leaf, torch.Tensor) and leaf.requires_grad for leaf in flat[0]]):
            return self._with_autograd(args, kwargs)
        form, tensors = self.form(args, kwargs, flat)
        if torch.is_grad_enabled() and closes_over_grad(form.program):
            return self._with_autograd(args, kwargs)
        if not any([t.requires_grad for t in tensors]):
            form.call = form.call or Call(*flat)
            self._last = form
        return form.program(tensors)

    def _with_autograd(self, args: tuple, kwargs: dict) -> Any:
        """Called from code that torch.autograd follows: outputs get gradients."""
        leaves, tree = flatten((args, kwargs))
        tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        wanted = [i for i, t in enumerate(tensors) if t.requires_grad]
        key = ("autograd", tuple(wanted), *self._key(leaves, tree))
        form = self._known(key)
        if form is None or form.program.stale:
            build_ahead()
            with modules_met() as modules:
                program = Differentiable(self.f, args, kwargs, wanted, self.memory_budget, self.max_rewrites)
            _check_hooks(modules)
            form = self._remember(key, program, modules)
        return form.program(tensors)

    def lookup(self, args: tuple, kwargs: dict) -> tuple[Compiled, list[torch.Tensor]]:
        """The compiled form's program for these arguments, and the tensors among them."""
        form, tensors = self.form(args, kwargs)
        return form.program, tensors

    def form(self, args: tuple, kwargs: dict, flat: tuple[list, Any] | None = None) -> tuple[Form, list[torch.Tensor]]:
        """The compiled form for these arguments (compiling it if need be), and the tensors among them. `flat`: them flattened,
        where that is known."""
        leaves, tree = flat or flatten((args, kwargs))
        tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        key = self._key(leaves, tree)
        form = self._known(key)
        if form is None:
            build_ahead()
            with modules_met() as modules, torch.inference_mode(False):  # calls outside of one use what is made here
                captured = capture(lambda a, k: self.f(*a, **k), args, kwargs, writes=True)
                program = self.compile(args, kwargs, captured)
            form = self._remember(key, program, modules)
        return form, tensors

    def _key(self, leaves: list, tree: Any) -> tuple:
        """What a compiled form holds for."""
        key = (tree, *_surroundings(), *map(signature, leaves))
        check_hashable(key)
        return key

    @property
    def programs(self) -> list[Any]:
        """All compiled forms, the one not used for longest first."""
        return [form.program for forms in self._forms.values() for form in forms]

    def _known(self, key: Any) -> Form | None:
        """A form for `key` that holds now."""
        for form in self._forms.get(key, ()):
            if form.outside.holds():
                self._forms.move_to_end(key)
                return form
        return None

    def _remember(self, key: Any, program: Any, modules: dict[nn.Module, None]) -> Form:
        form = Form(program, Outside(program.outside, modules))
        others = [other for other in self._forms.get(key, ()) if not other.outside.holds()]
        self._forms[key] = [form, *others]
        self._forms.move_to_end(key)
        while len(self.programs) > CACHE_SIZE:
            oldest = next(iter(self._forms))
            self._forms[oldest].pop()
            if not self._forms[oldest]:
                del self._forms[oldest]
        return form

    def compile(self, args: tuple, kwargs: dict, captured: Captured) -> Compiled:
        """Compile what was captured for these arguments."""
        for n in self.donate:
            if not 0 <= n < len(args):
                raise CaptureError(
                    f"{user_line()}: donate={self.donate} in a call with {len(args)} positional arguments. Donated "
                    f"arguments must be passed by position."
                )
        flags = [n in self.donate for n, arg in enumerate(args) for leaf in tree_flatten(arg)[0] if _is_tensor(leaf)]
        return Compiled(captured, [i for i, flag in enumerate(flags) if flag], self.memory_budget, self.max_rewrites, self._arena)


def followed() -> bool:
    """Does another transform, torch.func's included, follow the operations made now?"""
    return bool(torch._C._len_torch_dispatch_stack()) or torch._C._functorch.peek_interpreter_stack() is not None


class Call:
    """What a call without tensors that require grad looked like, to see whether another one looks the same. Its tensors are
    compared by torch's own guard, in C++, in a tenth of the time that their signatures take."""

    def __init__(self, leaves: list, tree: Any):
        self.tree, self.surroundings = tree, _surroundings()
        tensors, self.static = _parted(leaves)
        self.count = len(tensors)
        self.alike = alike(tensors)

    def tensors(self, leaves: list, tree: Any) -> list[torch.Tensor] | None:
        """The tensors among the leaves, if everything is as it was."""
        if tree != self.tree or _surroundings() != self.surroundings:
            return None
        tensors, static = _parted(leaves)
        if static != self.static or len(tensors) != self.count or any(map(_is_nested, tensors)):  # the guard ends the process then
            return None
        return tensors if self.alike(*tensors) else None


def _parted(leaves: list) -> tuple[list[torch.Tensor], list[tuple]]:
    """The tensors; and the other leaves, each with its place."""
    tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
    if len(tensors) == len(leaves):
        return tensors, []
    return tensors, [(i, signature(leaf)) for i, leaf in enumerate(leaves) if not isinstance(leaf, torch.Tensor)]


def _surroundings() -> tuple:
    """What a compiled form depends on beside its arguments."""
    autocast = torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu")
    device = torch.get_default_device() if torch._C._len_torch_function_stack() else None  # which sets a mode
    return torch.get_num_threads(), torch.get_default_dtype(), device, autocast


def _check_hooks(modules: Iterable[nn.Module]) -> None:
    """Raises CaptureError for hooks that torch.autograd would run within."""
    hooked = next((m for m in modules if m._backward_hooks or m._backward_pre_hooks), None)
    if hooked is not None:
        raise CaptureError(
            f"{user_line()}: {type(hooked).__name__} has backward hooks, which torch.autograd runs, and it takes no part within a jitted "
            f"function. Use hooks of parameters, or of what goes into the jitted function and comes out of it, or don't jit it."
        )


_is_nested = attrgetter("is_nested")


def _is_tensor(leaf: Any) -> bool:
    return isinstance(leaf, torch.Tensor)
