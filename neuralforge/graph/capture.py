"""From a Python function of tensors to a `Graph`, without arithmetic or memory: operators run on fake tensors."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
)
from torch.distributions import Distribution
from torch.utils._python_dispatch import _disable_current_modes

from ..errors import CaptureError
from ..memory import paused_collector
from . import gradient_mode, source
from .by_storage import from_operand
from .fake import FakeMode, storage_of
from .ir import Equation, Graph, Value, leaves, map_tree, substitute
from .literals import Literals
from .operators import BY_STORAGE, Traits, is_random, is_unique
from .refused import TOLD_OTHERWISE, check_dense, data_dependent
from .source import line_of, origin, user_line
from .switched_off import SwitchedOff
from .tracer import Tracer
from .tree import TreeSpec, tree_flatten, tree_unflatten
from .without_data import WithoutData, own_batch_norm

aten = torch.ops.aten


@dataclass(eq=False)
class Captured:
    """A function as a graph. The graph's inputs are the tensors among the flattened arguments, in order; its outputs
    are the flattened results, followed by the new values of the arguments the function wrote to (`writes`), and of the tensors it
    closes over and wrote to (`closed`)."""

    graph: Graph
    out_tree: TreeSpec
    writes: list[int]
    """Positions, among the graph's inputs, of the arguments written in place."""
    closed: list[torch.Tensor] = field(default_factory=list)


@dataclass(eq=False)
class Whole:
    """What an equation applies that stands for a call of a function with a derivative rule of its own. The equation has
    the flattened arguments; they are called with `args(flat)`. Only `vmap` meets such equations."""

    function: Any
    args: Callable[[list], tuple]


class Capture(Tracer):
    """Records every operator as an equation. Tensors that come from outside become constants, by reference. With
    `whole`, calls of functions with derivative rules of their own are one equation each; with `writes`, such constants may be
    written to."""

    def __init__(self, whole: bool = False, writes: bool = False) -> None:
        super().__init__()
        self.whole, self.writes = whole, writes
        self.graph = Graph()
        self.fake_mode = FakeMode()
        self._values: dict[int, Value] = {}  # id of a fake tensor -> its value, which keeps the tensor alive
        self._constants: dict[int, Value] = {}  # id of a tensor from outside -> its value
        self._outside: list[torch.Tensor] = []  # keeps those alive
        self._partial: set[int] = set()  # storages of inputs that are views of larger tensors outside
        self._names = itertools.count()
        self._constants_only = False
        with _disable_current_modes():
            self._generator = torch.get_rng_state()

    def input(self, tensor: torch.Tensor) -> torch.Tensor:
        """A new graph input shaped like `tensor`; returns the fake tensor that stands for it."""
        value = self._new(self._fake(tensor))
        self.graph.inputs.append(value)
        return value.fake

    def _dispatch(self, func: Callable, traits: Traits, args: tuple, kwargs: dict) -> Any:
        if func.namespace == "c10d":
            raise CaptureError(
                f"{user_line()}: {func.overloadpacket} of torch.distributed writes in place, in its own time, which a graph doesn't see. Use "
                f"torch.distributed._functional_collectives, whose results are new tensors, or call it outside of the captured function."
            )
        return super()._dispatch(func, traits, args, kwargs)

    def record(self, func: Callable, args: tuple, kwargs: dict) -> Any:
        if func.overloadpacket in BY_STORAGE:
            if storage_of(args[0]) in self._partial:
                raise CaptureError(
                    f"{user_line()}: {func} reads the memory around a tensor that is itself a part of a larger one, which a "
                    f"graph doesn't see. Use slicing, unfold or diagonal, or pass the larger tensor."
                )
            return from_operand(lambda func, args: self._record(func, args, {}), func, args, kwargs)
        if func is aten._efficientzerotensor.default:  # torch.func's zeros without memory, of which kernels know nothing
            func = aten.zeros.default
        if func is aten._neg_view.default:  # a kernel would read the numbers in memory, as they are
            func = aten.neg.default
        if func is aten._to_copy.default and not isinstance(args[0], torch.Tensor):  # numbers come as such, not as tensors of one
            func, args, kwargs = aten.full.default, ([], args[0]), {k: v for k, v in kwargs.items() if k in ("dtype", "device")}
        return self._record(func, args, kwargs)

    def _record(self, func: Callable, args: tuple, kwargs: dict) -> Any:
        if (gradient_mode.state.off or self._constants_only) and func is not aten.detach.default:
            args, kwargs = map_tree(self._detach, (args, kwargs))  # vmap's graphs are differentiated later
        arg_values, kwarg_values = map_tree(self.value, args), map_tree(self.value, kwargs)
        fakes = map_tree(lambda leaf: leaf.fake if isinstance(leaf, Value) else leaf, (arg_values, kwarg_values))
        if is_random(func):
            self.check_seeds()
        try:
            out = func(*fakes[0], **fakes[1])
        except (DataDependentOutputException, DynamicOutputShapeException) as e:
            if (out := self._known(func, arg_values, kwarg_values)) is None:
                raise CaptureError(data_dependent(func)) from e
            return out
        outputs = map_tree(self._bind, out)
        self.graph.equations.append(Equation(func, arg_values, kwarg_values, outputs, user_line(), origin()))
        return out

    def _known(self, func: Callable, args: tuple, kwargs: dict) -> Any:
        """The result of an operator that asks for data, where literals alone tell them (triangles of `torch.ones(n, n)`, all but the
        diagonal); else None."""
        if func is aten.masked_select.default:
            shape = torch.broadcast_shapes(args[0].shape, args[1].shape)
            x, mask = (self._record(aten.expand.default, (v.fake, shape), {}) for v in args)
            func, args = aten.index.Tensor, (self.value(x), [self.value(mask)])
        literals, indexed = Literals(self.graph), func is aten.index.Tensor
        asked = [v for v in args[1] if v is not None and v.dtype in (torch.bool, torch.uint8)] if indexed else leaves((args, kwargs))
        known = {v: literals(v) for v in asked}
        if is_unique(func) or any(x is None for x in known.values()):
            return None
        with _disable_current_modes():
            if indexed:
                places = {v: mask.nonzero().unbind(1) for v, mask in known.items()}
            else:
                out = func(*substitute(args, known), **substitute(kwargs, known))
        if not indexed:
            return map_tree(self._literal, out)
        indices = [x for v in args[1] for x in (map(self._literal, places[v]) if v in places else [v and v.fake])]
        return self._record(func, (args[0].fake, indices), {})

    def _literal(self, x: Any) -> Any:
        """A tensor of known numbers, brought in as `torch.tensor` does; other things unchanged."""
        return self._record(aten.lift_fresh.default, (x,), {}) if isinstance(x, torch.Tensor) else x

    @contextmanager
    def constant(self) -> Iterator[None]:
        before, self._constants_only = self._constants_only, True
        try:
            yield
        finally:
            self._constants_only = before

    def _detach(self, x: Any) -> Any:
        return self.record(aten.detach.default, (x,), {}) if isinstance(x, torch.Tensor) else x

    def record_whole(self, function: Any, f: Callable, args: tuple) -> Any:
        """The result of `f(*args)`, which `function` computes with a derivative of its own, as one equation."""
        flat, tree = tree_flatten(args)
        given = [self.value(self.now(x)) for x in flat]
        before = len(self.graph.equations)
        out, out_tree = tree_flatten(f(*args))
        out = [aten.alias.default(y) if isinstance(y, torch.Tensor) else y for y in out]
        parts = self.graph.equations[before:]
        known = {*(v for eq in parts for v in eq.results), *(v for v in given if isinstance(v, Value)), *self.graph.constants}
        closed = [v for eq in parts for v in eq.inputs if v not in known]
        if closed:
            raise CaptureError(
                f"{user_line()}: {function.__name__} has a derivative rule of its own and closes over a tensor of shape "
                f"{tuple(closed[0].shape)} of the function given to vmap. Pass it as an argument."
            )
        outputs = [self.value(y) for y in out]
        self.graph.equations[before:] = [
            Equation(Whole(function, lambda leaves: tree_unflatten(leaves, tree)), tuple(given), {}, outputs, user_line())
        ]
        return tree_unflatten(out, out_tree)

    def value(self, x: Any) -> Any:
        """The graph's value for a tensor (a new constant if the tensor comes from outside); other things unchanged."""
        if not isinstance(x, torch.Tensor):
            return x
        if isinstance(x, FakeTensor) and x.fake_mode is self.fake_mode:
            return self._values.get(id(x)) or self._new(x)
        if isinstance(x, FakeTensor) and getattr(x.fake_mode, "finished", False):
            raise CaptureError(
                f"{user_line()}: a tensor of shape {tuple(x.shape)} that was made while another function was captured, and "
                f"outlives that. It has no values: return what is needed outside from that function."
            )
        if id(x) not in self._constants:
            self._constants[id(x)] = self._resolved(x) if x.is_neg() or x.is_conj() else self._constant(x)
            self._outside.append(x)
        return self._constants[id(x)]

    def _constant(self, x: torch.Tensor) -> Value:
        value = self._new(self._fake(x))
        self.graph.constants[value] = x
        return value

    def _resolved(self, x: torch.Tensor) -> Value:
        """A view from outside that is still to be negated or conjugated, computed: kernels read memory."""
        view, op = (torch._neg_view, aten.neg.default) if x.is_neg() else (torch._conj, aten._conj_physical.default)
        with _disable_current_modes():
            memory = self.value(view(x))
            with self.fake_mode:
                value = self._new(op(memory.fake))
        self.graph.equations.append(Equation(op, (memory,), {}, value, user_line(), origin()))
        return value

    def check_external_write(self, x: torch.Tensor) -> None:
        if id(x) not in self._values and not self.writes:
            raise CaptureError(
                f"{user_line()}: in-place write to a captured constant, a tensor of shape {tuple(x.shape)} and dtype "
                f"{x.dtype} that the function closes over. The write would be lost after the first call: pass the "
                f"tensor as an argument and return its new value."
            )
        if self.writes and any(n > 1 and step == 0 for n, step in zip(x.shape, x.stride())):
            raise CaptureError(
                f"{user_line()}: the function writes in place to a tensor of shape {tuple(x.shape)} of which several elements are one "
                f"place in memory (an expanded one, of strides {x.stride()}). Pass a clone."
            )

    def check_seeds(self) -> None:
        """Raises CaptureError if the function has seeded torch's generator of random numbers so far."""
        with _disable_current_modes():
            now = torch.get_rng_state()
            seeded = not torch.equal(now, self._generator) and torch.equal(now, torch.Generator().manual_seed(torch.initial_seed()).get_state())
        if seeded:
            raise CaptureError(
                f"{user_line()}: the function seeds torch's generator of random numbers, which a graph would not do in later calls. Seed "
                f"it outside, or draw from nf.random with a key."
            )

    def _fake(self, x: torch.Tensor) -> torch.Tensor:
        check_dense(x)
        with _disable_current_modes(), self.fake_mode:
            fake = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device)
        if x.untyped_storage().nbytes() != fake.untyped_storage().nbytes():
            self._partial.add(storage_of(fake))
        return fake

    def _new(self, fake: torch.Tensor) -> Value:
        value = Value(f"v{next(self._names)}", fake)
        self._values[id(fake)] = value
        return value

    def _bind(self, x: Any) -> Any:
        # An operator may hand back its own argument; the equation still defines a new value for what follows.
        return self._new(x) if isinstance(x, torch.Tensor) else x


def capture(f: Callable, *args: Any, whole: bool = False, writes: bool = False) -> Captured:
    """Capture `f(*args)`; `args` are pytrees whose tensors may be real or fake (nothing of them is read but shape,
    dtype, strides and device). Other leaves are static: the graph holds for their values only.

    `whole`, `writes`: see `Capture`. Raises CaptureError where Python control flow depends on tensor data, or a captured constant
    is written to that mustn't be.
    """
    leaves, tree = tree_flatten(args)
    mode = Capture(whole, writes)
    source.capturing += 1
    try:
        with paused_collector():
            return _capture(f, mode, leaves, tree)
    finally:
        source.capturing -= 1
        mode.fake_mode.finished = True


def _capture(f: Callable, mode: Capture, leaves: list, tree: TreeSpec) -> Captured:
    settings = _disable_current_modes(), gradient_mode.differentiating(), _validation, _uncached_casts(), own_batch_norm, WithoutData()
    with ExitStack() as stack:
        for setting in (*settings, mode.fake_mode, mode):
            stack.enter_context(setting)
        fakes = [mode.input(leaf) if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]
        try:
            result = f(*tree_unflatten(fakes, tree))
        except (RuntimeError, TypeError) as e:
            why = next((why for words, why in TOLD_OTHERWISE.items() if words in str(e)), None)
            if why is None:
                raise
            raise CaptureError(f"{line_of(e)}: {why}") from e
        out, out_tree = tree_flatten(result)
        out = [mode.now(leaf) for leaf in out]
        written = {id(t): (t, new) for t, new in mode.external_writes()}
    mode.check_seeds()
    _check_done(out)
    tensors = [t for t in fakes if isinstance(t, torch.Tensor)]
    writes = [i for i, t in enumerate(tensors) if id(t) in written]
    given = [written.pop(id(tensors[i]))[1] for i in writes]
    closed = [t for t, _ in written.values()]
    mode.graph.outputs = [mode.value(leaf) for leaf in (*out, *given, *(new for _, new in written.values()))]
    for t in closed:
        if any(other is not t and storage_of(other) == storage_of(t) for other in (*mode.graph.constants.values(), *closed)):
            raise CaptureError(
                f"the function writes in place to a tensor of shape {tuple(t.shape)} that it closes over, and closes over another one of the "
                f"same memory, which would not see the write. Use a clone of one of them, or pass it as an argument."
            )
    return Captured(mode.graph, out_tree, writes, closed)


_validation = SwitchedOff(lambda: Distribution._validate_args, Distribution.set_default_validate_args)
"""torch.distributions asks for the values of its arguments unless it is told not to validate them."""


@contextmanager
def _uncached_casts() -> Iterator[None]:
    """Autocast keeps what it has cast of parameters, by the parameter: of earlier calls, which are not those of the graph, and of the
    capture, which have no values."""
    before = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(before)


def _check_done(out: list) -> None:
    """Raises CaptureError if the function has left something for later that no graph can hold."""
    later = next((x for x in out if inspect.isgenerator(x) or inspect.iscoroutine(x) or inspect.isasyncgen(x)), None)
    if later is not None:
        raise CaptureError(
            f"{user_line()}: the function returns a {type(later).__name__}, whose code would run after the graph was captured. Return "
            f"what it yields, as a list."
        )
