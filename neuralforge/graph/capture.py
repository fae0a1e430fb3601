"""From a Python function of tensors to a `Graph`, without arithmetic or memory: operators run on fake tensors."""

from __future__ import annotations

import gc
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
)
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from ..errors import CaptureError
from . import source
from .ir import Equation, Graph, Value, map_tree
from .source import origin, user_line
from .tracer import Tracer, operator_traits

_BY_STORAGE = {getattr(torch.ops.aten, name) for name in ("as_strided", "as_strided_scatter", "as_strided_copy")}


@dataclass(eq=False)
class Captured:
    """A function as a graph. The graph's inputs are the tensors among the flattened arguments, in order; its outputs
    are the flattened results, followed by the new values of the arguments the function wrote to (`writes`)."""

    graph: Graph
    out_tree: TreeSpec
    writes: list[int]
    """Positions, among the graph's inputs, of the arguments written in place."""


class _Uncached(Exception):
    """An argument that isn't described by its type alone."""


class FakeMode(FakeTensorMode):
    """PyTorch's fake tensors, without the wrapper that imports torch._dynamo (0.9 s) at the first operator, and with a
    cache of its own: PyTorch's, which serves symbolic shapes too, takes most of the time of a capture."""

    def __init__(self) -> None:
        super().__init__()
        self._seen: dict[tuple, tuple] = {}  # operator and argument types -> how to make the results

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func.namespace != "aten" or not operator_traits(func).pure or self.in_kernel_invocation:
            return self.dispatch(func, types, args, kwargs)
        try:
            key = (func, torch.get_default_dtype(), self._type(args), self._type(tuple(kwargs.items())))
            known = self._seen.get(key)
        except (_Uncached, TypeError):  # TypeError: an argument that can't be hashed
            return self.dispatch(func, types, args, kwargs)
        if known is None:
            out = self.dispatch(func, types, args, kwargs)
            self._remember(key, args, out)
            return out
        kind, storage_of_first, results = known
        storage = args[0].untyped_storage() if storage_of_first else None
        made = [self._make(storage, *r) for r in results]
        return made[0] if kind is None else kind(made)

    def _type(self, x: Any) -> tuple:
        """Of an argument, all that the results' shapes, strides and dtypes can depend on."""
        if isinstance(x, torch.Tensor):
            if not self._plain(x):
                raise _Uncached
            return x.shape, x.stride(), x.storage_offset(), x.dtype, x.device
        if isinstance(x, (list, tuple)):
            return type(x), *map(self._type, x)
        return type(x), x

    def _plain(self, x: Any) -> bool:
        known = type(x) is FakeTensor and x.fake_mode is self and x.constant is None
        return known and x.layout == torch.strided and not x.dtype.is_complex  # complex: lazy conjugates

    def _remember(self, key: tuple, args: tuple, out: Any) -> None:
        """Keep the types of results that are all new, or all views of the first argument."""
        results = out if isinstance(out, (list, tuple)) else (out,)
        if not all(map(self._plain, results)):
            return
        given: list[int] = []
        map_tree(lambda x: given.append(_storage(x)) if isinstance(x, torch.Tensor) else None, args)
        shared = [_storage(r) in given for r in results]
        of_first = all(shared) and isinstance(args[0], torch.Tensor) and all(_storage(r) == given[0] for r in results)
        if of_first or not any(shared) and not any(r.storage_offset() for r in results):
            types = [(r.shape, r.stride(), r.storage_offset(), r.dtype, r.device) for r in results]
            kind = None if results is not out else list if isinstance(out, list) else tuple
            self._seen[key] = kind, of_first, types

    def _make(self, storage: Any, shape: Any, strides: Any, offset: int, dtype: torch.dtype, device: Any) -> torch.Tensor:
        with torch._C._DisableTorchDispatch():
            if storage is None:
                meta = torch.empty_strided(shape, strides, dtype=dtype, device="meta")
            else:
                meta = torch.empty(0, dtype=dtype, device="meta").set_(storage, offset, shape, strides)
        return FakeTensor(self, meta, device)


def _storage(x: torch.Tensor) -> int:
    return x.untyped_storage()._cdata


class Capture(Tracer):
    """Records every operator as an equation. Tensors that come from outside become constants, by reference."""

    def __init__(self) -> None:
        super().__init__()
        self.graph = Graph()
        self.fake_mode = FakeMode()
        self._values: dict[int, Value] = {}  # id of a fake tensor -> its value, which keeps the tensor alive
        self._constants: dict[int, Value] = {}
        self._partial: set[int] = set()  # storages of inputs that are views of larger tensors outside
        self._names = itertools.count()

    def input(self, tensor: torch.Tensor) -> torch.Tensor:
        """A new graph input shaped like `tensor`; returns the fake tensor that stands for it."""
        value = self._new(self._fake(tensor))
        self.graph.inputs.append(value)
        return value.fake

    def record(self, func: Callable, args: tuple, kwargs: dict) -> Any:
        if func.overloadpacket in _BY_STORAGE and _storage(args[0]) in self._partial:
            raise CaptureError(
                f"{user_line()}: {func} reads the memory around a tensor that is itself a part of a larger one, which a "
                f"graph doesn't see. Use slicing, unfold or diagonal, or pass the larger tensor."
            )
        arg_values, kwarg_values = map_tree(self.value, args), map_tree(self.value, kwargs)
        fakes = map_tree(lambda leaf: leaf.fake if isinstance(leaf, Value) else leaf, (arg_values, kwarg_values))
        try:
            out = func(*fakes[0], **fakes[1])
        except (DataDependentOutputException, DynamicOutputShapeException) as e:
            raise CaptureError(_data_dependent(func)) from e
        outputs = map_tree(self._bind, out)
        self.graph.equations.append(Equation(func, arg_values, kwarg_values, outputs, user_line(), origin()))
        return out

    def value(self, x: Any) -> Any:
        """The graph's value for a tensor (a new constant if the tensor comes from outside); other things unchanged."""
        if not isinstance(x, torch.Tensor):
            return x
        if isinstance(x, FakeTensor) and x.fake_mode is self.fake_mode:
            return self._values.get(id(x)) or self._new(x)
        if id(x) not in self._constants:
            value = self._constants[id(x)] = self._new(self._fake(x))
            self.graph.constants[value] = x
        return self._constants[id(x)]

    def check_external_write(self, x: torch.Tensor) -> None:
        if id(x) not in self._values:
            raise CaptureError(
                f"{user_line()}: in-place write to a captured constant, a tensor of shape {tuple(x.shape)} and dtype "
                f"{x.dtype} that the function closes over. The write would be lost after the first call: pass the "
                f"tensor as an argument and return its new value."
            )

    def _fake(self, x: torch.Tensor) -> torch.Tensor:
        if x.layout != torch.strided:
            raise CaptureError(
                f"{user_line()}: a tensor of layout {x.layout} can't be captured; expected a dense one. Convert it with "
                f".to_dense()."
            )
        with _disable_current_modes(), self.fake_mode:
            fake = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device)
        if x.untyped_storage().nbytes() != fake.untyped_storage().nbytes():
            self._partial.add(_storage(fake))
        return fake

    def _new(self, fake: torch.Tensor) -> Value:
        value = Value(f"v{next(self._names)}", fake)
        self._values[id(fake)] = value
        return value

    def _bind(self, x: Any) -> Any:
        # An operator may hand back its own argument; the equation still defines a new value for what follows.
        return self._new(x) if isinstance(x, torch.Tensor) else x


def capture(f: Callable, *args: Any) -> Captured:
    """Capture `f(*args)`; `args` are pytrees whose tensors may be real or fake (nothing of them is read but shape,
    dtype, strides and device). Other leaves are static: the graph holds for their values only.

    Raises CaptureError where Python control flow depends on tensor data, or a captured constant is written to.
    """
    leaves, tree = tree_flatten(args)
    mode = Capture()
    source.capturing += 1
    collects = gc.isenabled()
    gc.disable()  # going through every object of torch's again and again would be a third of the time
    try:
        return _capture(f, mode, leaves, tree)
    finally:
        source.capturing -= 1
        if collects:
            gc.enable()


def _capture(f: Callable, mode: Capture, leaves: list, tree: TreeSpec) -> Captured:
    with _disable_current_modes(), torch.no_grad(), mode.fake_mode, mode:
        fakes = [mode.input(leaf) if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]
        out, out_tree = tree_flatten(f(*tree_unflatten(fakes, tree)))
        out = [mode.now(leaf) for leaf in out]
        written = {id(t): new for t, new in mode.external_writes()}
    tensors = [t for t in fakes if isinstance(t, torch.Tensor)]
    writes = [i for i, t in enumerate(tensors) if id(t) in written]
    mode.graph.outputs = [mode.value(leaf) for leaf in (*out, *(written[id(tensors[i])] for i in writes))]
    return Captured(mode.graph, out_tree, writes)


def _data_dependent(func: Callable) -> str:
    if func is torch.ops.aten._local_scalar_dense.default:
        what = (
            "the program asks for the value of a tensor (through `if`, `while`, `.item()`, `int()` or `float()`), "
            "which isn't known while a graph is captured"
        )
        mend = "Use torch.where (or arithmetic) to choose between results, or move the decision outside the function"
    else:
        what = f"{func} gives a result whose shape depends on the data, which a captured graph can't hold"
        mend = "Use a masked operation of fixed shape (torch.where, multiplication by a mask), or move it outside"
    return f"{user_line()}: {what}. {mend}."
