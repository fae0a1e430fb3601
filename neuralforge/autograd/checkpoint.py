"""Checkpointing: keep a function's inputs rather than its intermediate results, and run it again in the backward pass
(Griewank & Walther 2000; Chen et al. 2016, https://arxiv.org/abs/1604.06174).

What random operators drew is always kept, so that the second run has the same dropout, eagerly, captured, and on any
number of ranks. A policy can keep more: matrix products, say, or what the model calls by name.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack
from torch.utils._pytree import tree_flatten, tree_unflatten

from ..errors import DifferentiationError
from ..graph import source
from ..graph.tracer import Tracer
from .custom import differentiating
from .forward import Forward
from .tape import Tape

aten = torch.ops.aten

Policy = Callable[[Any, "str | None"], bool]
"""`policy(operator, name)`: is this result kept? `operator` is an ATen overload; `name` is given by checkpoint_name."""

PRODUCTS = {aten.mm, aten.addmm, aten.bmm, aten.baddbmm, aten.convolution, aten._scaled_dot_product_flash_attention_for_cpu}


def save_products(op: Any, name: str | None) -> bool:
    """Keep the results of matrix products, convolutions and attention; compute the cheap rest again."""
    return getattr(op, "overloadpacket", None) in PRODUCTS


def save_only(*names: str) -> Policy:
    """Keep the values that `checkpoint_name` gave one of these names."""
    return lambda op, name: name in names


def checkpoint_name(x: torch.Tensor, name: str) -> torch.Tensor:
    """`x`, under a name that checkpoint policies know it by."""
    for mode in reversed(_get_current_dispatch_mode_stack()):
        if isinstance(mode, _Keeper):
            return mode.named(x, name)
    return x


def checkpoint(f: Callable, policy: Policy | None = None) -> Callable:
    """`f` (of pytrees of tensors, closing over no differentiated tensor) without its residuals: reverse mode keeps the
    arguments and what `policy` says (by default nothing but random draws), and runs `f` again when it needs the rest.
    Forward mode and plain calls are unchanged.
    """

    @wraps(f)
    def checkpointed(*args: Any) -> Any:
        tape = differentiating(args)
        if tape is None or isinstance(tape, Forward):
            return f(*args)
        kept: list = []
        with tape.paused():
            with _Keeper(policy, kept, replay=False):
                out = f(*args)
        outputs, out_tree = tree_flatten(out)
        inputs, in_tree = tree_flatten(args)
        inputs = [tape.now(x) for x in inputs]

        def pull(gs: list) -> list:
            again = Tape()
            with torch.no_grad():
                with _Keeper(policy, list(kept), replay=True), again, source.attributed(source.user_line(), "recomputed"):
                    watched = [again.watch(x) if tape.node(x) is not None else x for x in inputs]
                    results, tree = tree_flatten(f(*tree_unflatten(watched, in_tree)))
                    results = [again.now(y) for y in results]
                if tree != out_tree:
                    raise DifferentiationError(f"{f.__name__} returned another structure when it was run again: {tree}.")
                leaves = [w for w in watched if again.node(w) is not None]
                found = iter(again.pull(results, gs, leaves))
            return [next(found) if again.node(w) is not None else None for w in watched]

        return tree_unflatten(tape.attach(outputs, inputs, pull, f"checkpoint {f.__name__}"), out_tree)

    return checkpointed


class _Keeper(Tracer):
    """Keeps chosen results in the order they are made; in the second run, hands them out instead of computing them."""

    def __init__(self, policy: Policy | None, kept: list, replay: bool):
        super().__init__()
        self.policy, self.kept, self.replay = policy, kept, replay

    def record(self, func: Callable, args: tuple, kwargs: dict) -> Any:
        random = torch.Tag.nondeterministic_seeded in func.tags
        if not random and (self.policy is None or not self.policy(func, None)):
            return func(*args, **kwargs)
        return self._keep(lambda: func(*args, **kwargs))

    def named(self, x: torch.Tensor, name: str) -> torch.Tensor:
        if self.policy is None or not self.policy(None, name):
            return x
        stored = self._keep(lambda: x)
        tape = differentiating((x,)) if self.replay else None
        # The kept value stands in for the one computed again, which then only passes derivatives on.
        return tape.attach([stored], [x], lambda gs: gs, name)[0] if isinstance(tape, Tape) else stored

    def _keep(self, compute: Callable[[], Any]) -> Any:
        if self.replay:
            return self.kept.pop(0)
        out = compute()
        self.kept.append(out)
        return out
