"""`nf.jit`: capture once, transform, run."""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Callable
from functools import update_wrapper
from typing import Any

import torch
from torch.utils._pytree import TreeSpec, tree_flatten

from ..errors import CaptureError, MemoryBudgetError
from ..graph import Captured, capture
from ..graph.source import user_line
from .compiled import Compiled
from .torch_autograd import Differentiable, closes_over_grad

CACHE_SIZE = 64


class Jit:
    """A function compiled for each combination of argument structure, shapes, dtypes, strides and static values.

    Called inside another transform (`nf.grad`, `nf.jit`, ...) it simply runs its Python function, which that
    transform then follows. Called on tensors that require grad, or closing over such (a module's parameters), its outputs
    carry torch.autograd gradients.
    """

    def __init__(self, f: Callable, donate: tuple[int, ...], memory_budget: int | None = None):
        update_wrapper(self, f)
        self.f = f
        self.donate = donate
        self.memory_budget = memory_budget
        self._compiled: OrderedDict[Any, Compiled] = OrderedDict()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if torch._C._len_torch_dispatch_stack():
            return self.f(*args, **kwargs)
        if torch.is_grad_enabled():
            leaves = tree_flatten((args, kwargs))[0]
            if any(isinstance(leaf, torch.Tensor) and leaf.requires_grad for leaf in leaves):
                return self._with_autograd(args, kwargs)
        compiled, tensors = self.lookup(args, kwargs)
        if torch.is_grad_enabled() and closes_over_grad(compiled):
            return self._with_autograd(args, kwargs)
        return compiled(tensors)

    def _with_autograd(self, args: tuple, kwargs: dict) -> Any:
        """Called from code that torch.autograd follows: outputs get gradients."""
        leaves, tree = tree_flatten((args, kwargs))
        tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        wanted = [i for i, t in enumerate(tensors) if t.requires_grad]
        key = ("autograd", tuple(wanted), *self._key(leaves, tree))
        program = self._compiled.get(key)
        if program is None or program.stale:
            program = self._remember(key, Differentiable(self.f, args, kwargs, wanted, self.memory_budget))
        return program(tensors)

    def lookup(self, args: tuple, kwargs: dict) -> tuple[Compiled, list[torch.Tensor]]:
        """The compiled form for these arguments (compiling it if need be), and the tensors among them."""
        leaves, tree = tree_flatten((args, kwargs))
        tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        key = self._key(leaves, tree)
        compiled = self._compiled.get(key)
        if compiled is None:
            captured = capture(lambda a, k: self.f(*a, **k), args, kwargs)
            compiled = self._remember(key, self.compile(args, kwargs, captured))
        else:
            self._compiled.move_to_end(key)
        return compiled, tensors

    def _key(self, leaves: list, tree: TreeSpec) -> tuple:
        """What a compiled form holds for."""
        key = (tree, torch.get_num_threads(), *(_signature(leaf) for leaf in leaves))
        try:
            hash(key)
        except TypeError as e:
            unhashable = next(leaf for leaf in leaves if not isinstance(leaf, torch.Tensor) and leaf.__hash__ is None)
            raise CaptureError(
                f"{user_line()}: an argument of nf.jit holds {unhashable!r} ({type(unhashable).__name__}), which is "
                f"neither a tensor nor hashable. Pass tensors, numbers, strings, or pytrees of them."
            ) from e
        return key

    def _remember(self, key: Any, compiled: Any) -> Any:
        self._compiled[key] = compiled
        while len(self._compiled) > CACHE_SIZE:
            self._compiled.popitem(last=False)
        return compiled

    def compile(self, args: tuple, kwargs: dict, captured: Captured) -> Compiled:
        """Compile what was captured for these arguments."""
        for n in self.donate:
            if not 0 <= n < len(args):
                raise CaptureError(
                    f"{user_line()}: donate={self.donate} in a call with {len(args)} positional arguments. Donated "
                    f"arguments must be passed by position."
                )
        flags = [n in self.donate for n, arg in enumerate(args) for leaf in tree_flatten(arg)[0] if _is_tensor(leaf)]
        return Compiled(captured, [i for i, flag in enumerate(flags) if flag], self.memory_budget)


def jit(
    f: Callable | None = None, *, donate: tuple[int, ...] | int = (), memory_budget: int | str | None = None
) -> Any:
    """Compile `f`, a function of pytrees of tensors: its first call with given shapes captures it as one graph,
    optimises it and plans its memory; later calls run the result.

    `donate`: positions of arguments whose memory the results may take over (the training state); the tensors passed
    there must not be used afterwards. Leaves that aren't tensors (numbers, strings, modules) are static: another
    value compiles anew, so pass what changes from call to call as a tensor.

    `memory_budget`: bytes, or text such as "600MB", that a call may allocate at its peak beyond its arguments; values
    are then computed again rather than kept, as few and as cheap ones as will do (`compiler/remat.py`). Raises
    MemoryBudgetError, with the smallest budget that can be met.

    Usable as `nf.jit(f)`, `@nf.jit` and `@nf.jit(donate=0)`. Raises CaptureError where Python control flow depends on
    tensor data. In-place writes to arguments take effect after the call; in-place writes to tensors that `f` closes
    over raise.
    """
    donate = (donate,) if isinstance(donate, int) else tuple(donate)
    budget = _bytes(memory_budget) if isinstance(memory_budget, str) else memory_budget
    if f is None:
        return lambda f: Jit(f, donate, budget)
    return Jit(f, donate, budget)


def _bytes(text: str) -> int:
    """The number in "600MB", "1.5 GB" or "2GiB"."""
    units = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30}
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMG]?I?B)\s*", text.upper())
    if found is None:
        raise MemoryBudgetError(f"memory_budget={text!r}; expected bytes, or a number with a unit, as 600MB or 1.5GiB.")
    return int(float(found.group(1)) * units[found.group(2)])


def _is_tensor(leaf: Any) -> bool:
    return isinstance(leaf, torch.Tensor)


def _signature(leaf: Any) -> Any:
    if isinstance(leaf, torch.Tensor):
        return leaf.shape, leaf.stride(), leaf.dtype, leaf.device
    return type(leaf), leaf
