"""Checkpointing: keep a function's inputs rather than its intermediate results, and run it again in the backward pass
(Griewank & Walther 2000; Chen et al. 2016, https://arxiv.org/abs/1604.06174).

What random operators drew from torch's generator is always kept, so that the second run has the same dropout; what
they drew within `nf.random.stream` is drawn again, from the same counters. A policy can keep more: matrix products, say,
or what the model calls by name.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from functools import partial, wraps
from typing import Any

import torch
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from ..errors import DifferentiationError
from ..graph import gradient_mode, source
from ..graph.ir import map_tree
from ..graph.operators import operator_traits
from ..graph.tracer import Tracer
from ..graph.tree import tree_flatten, tree_unflatten
from ..random import draws, stream
from .custom import differentiating, meaning, name_of
from .forward import Forward
from .rules.table import find_definition, find_rule
from .tape import Tape, descend

aten, own = torch.ops.aten, torch.ops.neuralforge

Policy = Callable[[Any, "str | None"], bool]
"""`policy(operator, name)`: is this result kept? `operator` is an ATen overload; `name` is given by checkpoint_name."""

PRODUCTS = {
    aten.mm, aten.addmm, aten.bmm, aten.baddbmm, aten._grouped_mm, own.matmul, own.linear_cross_entropy, aten.convolution,
    aten._scaled_dot_product_flash_attention_for_cpu, aten._scaled_dot_product_flash_attention,
    aten._scaled_dot_product_efficient_attention, aten._scaled_dot_product_cudnn_attention, own.flash_attention,
}  # fmt: skip


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
            x = mode.named(x, name)
    return x


def checkpoint(f: Callable, policy: Policy | None = None) -> Callable:
    """`f` (of pytrees of tensors; a function or module) without its residuals: reverse mode keeps the arguments, what
    `f` closes over, and what `policy` says (by default nothing but random draws), and runs `f` again when it needs the
    rest. In-place writes to tensors from outside happen once. Unchanged: plain calls, forward mode, reverse mode over
    forward mode, and calls none of whose arguments is differentiated.

    Raises DifferentiationError where the second run does something else than the first did.
    """
    name = name_of(f)
    if isinstance(f, torch.nn.Module):
        # Its parameters are arguments too: functional_call may have put others in their place by the second run.
        run = checkpoint(lambda state, args, kwargs: torch.func.functional_call(f, state, args, kwargs), policy)
        return lambda *args, **kwargs: run({**dict(f.named_parameters()), **dict(f.named_buffers())}, args, kwargs)

    @wraps(f)
    def checkpointed(*args: Any, **kwargs: Any) -> Any:
        tape = differentiating((args, kwargs))
        if tape is None or isinstance(tape, Forward):
            return f(*args, **kwargs)
        args, kwargs = meaning(tape, (args, kwargs))
        first = _Keeper(policy, [], tape=tape)
        with tape.paused():
            with first:
                outputs, out_tree = tree_flatten(f(*args, **kwargs))
                outputs = [first.now(y) for y in outputs]
            first.write_back()
        given, in_tree = tree_flatten((args, kwargs))
        known = {id(x) for x in given}
        outside = [(raw, x) for raw, x in first.outside.values() if id(raw) not in known]
        inputs = [*given, *(x for _, x in outside)]

        def pull(gs: list) -> list:
            again = Tape()
            second = _Keeper(policy, list(first.kept), replay=again)
            line = source.user_line() if source.capturing else ""
            with gradient_mode.differentiating():
                with again, source.attributed(line, "recomputed"):
                    watched = [again.watch(x) if tape.node(x) is not None else x for x in inputs]
                    for (raw, _), x in zip(outside, watched[len(given) :]):
                        second.stand_in(raw, x)
                    with second:
                        a, k = tree_unflatten(watched[: len(given)], in_tree)
                        results, tree = tree_flatten(f(*a, **k))
                        results = [second.now(y) for y in results]
                    results = [again.now(y) for y in results]
                if tree != out_tree or second.kept or second.unread:
                    raise _diverged(name)
                found = again.pull(results, gs, [w for w in watched if again.node(w) is not None])
            back = iter(found)
            return [next(back) if again.node(w) is not None else None for w in watched]

        return tree_unflatten(tape.attach(outputs, inputs, pull, f"checkpoint {name}"), out_tree)

    return checkpointed


class _Keeper(Tracer):
    """Innermost while `f` runs. The first time it keeps chosen results, in the order they are made, and notes which
    tensors from outside `f` reads; the second time it hands the results out, put on the tape `replay`, instead of
    computing them."""

    def __init__(self, policy: Policy | None, kept: list, tape: Tape | None = None, replay: Tape | None = None):
        super().__init__()
        self.policy, self.kept, self.tape, self.replay = policy, kept, tape, replay
        self.outside: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        """Tensors that `f` closes over and that are tracked or were written, with what they mean on the tape."""
        self.unread: set[int] = set()
        """Stand-ins for those that the second run hasn't read yet."""

    def record(self, func: Callable, args: tuple, kwargs: dict) -> Any:
        if self.tape is not None:
            map_tree(self._note, (args, kwargs))
        elif self.unread:
            map_tree(lambda x: self.unread.discard(id(x)), (args, kwargs))
        random = draws(func, args, kwargs)
        chosen = random
        if not chosen and self.policy is not None and not operator_traits(func).is_view:
            chosen = self.policy(func, None)
        if not chosen:
            return func(*args, **kwargs)
        if find_rule(func) is None and (found := find_definition(func)) is not None:
            return descend(self, func, found, args, kwargs)  # the same parts in both runs
        if self.replay is None:
            source = _stream() if random else None
            place = source.drawn if source is not None else 0
            out = func(*args, **kwargs)
            self.kept.append((func, out if source is None else partial(source.draw, place)))
            return out
        out = self._next(func)
        if isinstance(out, partial):
            return out(func, args, kwargs)
        return out if self.replay._paused is not None else self.replay.record(func, args, kwargs, known=out)

    def named(self, x: torch.Tensor, name: str) -> torch.Tensor:
        if self.policy is None or not self.policy(None, name):
            return x
        if self.replay is None:
            self.kept.append((name, self.now(x)))
            return x
        # The kept value stands in for the one computed again, which then only passes derivatives on.
        x, stored = self.now(x), self._next(name)
        return stored if self.replay._paused is not None else self.replay.attach([stored], [x], lambda gs: gs, name)[0]

    def stand_in(self, raw: torch.Tensor, x: torch.Tensor) -> None:
        """Let the closed-over `raw` mean `x`."""
        raw.__dict__[self._now] = x
        self._written[id(raw)] = weakref.ref(raw)
        self.unread.add(id(x))

    def _note(self, x: Any) -> None:
        if isinstance(x, torch.Tensor) and self._made not in x.__dict__ and id(x) not in self.outside:
            meant = meaning(self.tape, x)
            if meant is not x or self.tape.node(x) is not None:
                self.outside[id(x)] = x, meant

    def _next(self, what: Any) -> Any:
        if not self.kept or self.kept[0][0] is not what and self.kept[0][0] != what:
            raise _diverged(str(what))
        alias = lambda x: torch.ops.aten.alias.default(x) if isinstance(x, torch.Tensor) else x
        return map_tree(alias, self.kept.pop(0)[1])


def _stream() -> stream | None:
    """The innermost `nf.random.stream`, if what is drawn now comes from it, not from a checkpoint that is run again."""
    for mode in reversed(_get_current_dispatch_mode_stack()):
        if isinstance(mode, stream):
            return mode
        if isinstance(mode, _Keeper) and mode.replay is not None:
            return None
    return None


def _diverged(what: str) -> DifferentiationError:
    return DifferentiationError(
        f"{source.user_line()}: a checkpointed function did something else when it was run again, at {what}. It must "
        f"read the same tensors and decide alike; pass as arguments what changes (parameters that functional_call swaps, say)."
    )
