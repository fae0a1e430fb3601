"""Fake tensors: the shape, strides, dtype and device of an operator's results, without arithmetic or memory."""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import torch
import torch._functorch.config
import torch.nested._internal.nested_tensor
from torch._decomp import meta_table
from torch._subclasses import fake_impls
from torch._subclasses.fake_tensor import (
    FakeTensor,
    FakeTensorConverter,
    FakeTensorMode,
)
from torch.utils._python_dispatch import TorchDispatchMode

from ..errors import CaptureError
from .ir import map_tree
from .operators import operator_traits
from .source import user_line
from .without_dynamo import postpone
from .without_sympy import numbers_only

aten = torch.ops.aten

_NORMS = {
    getattr(torch.ops.aten, name)
    for name in (
        "native_group_norm", "native_batch_norm", "_native_batch_norm_legit",
        "_native_batch_norm_legit_functional",
    )
}  # fmt: skip
"""Operators whose second and third results, statistics, PyTorch's fake ones take for as narrow as the input, also where the
weights are float32; the CPU's are float32 then."""

TENSORS = {torch.Tensor, torch.nn.Parameter, FakeTensor}
"""The classes that a shape, strides, a dtype and a device describe."""


def _swap(a: torch.Tensor, b: torch.Tensor) -> None:
    """In place of `torch.utils.swap_tensors`, by which `nn.Module.to` and the like convert parameters that are fake tensors. What
    follows a program knows tensors by their Python objects, so that they can't be swapped; nothing needs to be where
    nothing was converted."""
    if not isinstance(a, FakeTensor) or not isinstance(a.fake_mode, FakeMode):
        return _swap_tensors(a, b)
    same = storage_of(a) == storage_of(b) and (a.shape, a.stride(), a.storage_offset(), a.dtype) == (b.shape, b.stride(), b.storage_offset(), b.dtype)
    if not same:
        raise CaptureError(
            f"{user_line()}: a module converts its parameter of shape {tuple(a.shape)} from {a.dtype} to {b.dtype} while it runs (by .to(), "
            f".half() and so on), of which a graph would lose the derivative. Convert the module before, or the tensor by x.to()."
        )


_swap_tensors = torch.utils.swap_tensors
torch.utils.swap_tensors = _swap


class _Uncached(Exception):
    """An argument that isn't described by its type alone."""


class FakeMode(FakeTensorMode):
    """PyTorch's fake tensors, without importing torch._dynamo (`without_dynamo.py`) or sympy (`without_sympy.py`), and with
    a cache of its own: PyTorch's, which serves symbolic shapes too, takes most of the time of a capture."""

    def __init__(self) -> None:
        postpone()
        TorchDispatchMode.__init__(self)  # FakeTensorMode's own imports torch._dynamo for two settings
        self.allow_fallback_kernels = self.static_shapes = True
        self.propagate_real_tensors = self.allow_scalar_outputs = self.allow_non_fake_inputs = False
        self.cache_enabled = self.cache_crosscheck_enabled = self.in_kernel_invocation = False
        self.fake_tensor_converter = FakeTensorConverter(copy_data=False, export=False)
        settings = torch._functorch.config
        self.allow_meta = settings.fake_tensor_allow_meta
        self._allow_unsafe_data_ptr_access = settings.fake_tensor_allow_unsafe_data_ptr_access
        self.enter_stack, self.shape_env, self._stack, self._stack_trace = [], None, "", None
        self._mode_key = torch._C._TorchDispatchModeKey.FAKE
        self.nt_tensor_id_counter = torch.nested._internal.nested_tensor._tensor_id_counter
        self.nt_tensor_id_initial_count = self.nt_tensor_id_counter
        self.finished = False
        self._seen: dict[tuple, tuple] = {}  # operator and argument types -> how to make the results

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # or the first operator would import torch._dynamo

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.ops.prim.device.default:  # asked for at every turn
            return args[0].fake_device
        if func.namespace != "aten" or not operator_traits(func).pure or self.in_kernel_invocation:
            return self.dispatch(func, types, args, kwargs)
        try:
            key = (func, torch.get_default_dtype(), self._type(args), self._type(tuple(kwargs.items())))
            known = self._seen.get(key)
        except (_Uncached, TypeError):  # TypeError: an argument that can't be hashed
            return self.dispatch(func, types, args, kwargs)
        if known is None:
            out = self._infer(func, types, args, kwargs)
            if func.overloadpacket in _NORMS and _mixed(args):
                out = out[0], *(x.float() for x in out[1:3]), *out[3:]
            self._remember(key, args, out)
            return out
        kind, storage_of_first, results = known
        storage = args[0].untyped_storage() if storage_of_first else None
        made = [self._make(storage, *r) for r in results]
        return made[0] if kind is None else kind(made)

    def dispatch(self, func, types, args=(), kwargs=None):
        with numbers_only():
            return super().dispatch(func, types, args, kwargs or {})

    @numbers_only()
    def _infer(self, func: Any, types: Any, args: tuple, kwargs: dict) -> Any:
        """The results: by the operator's kernel for tensors without data where that tells them, as it mostly does when
        sizes are numbers; otherwise PyTorch's way, which serves symbols too and takes twice as long."""
        if func is aten.native_layer_norm.default:
            return self._layer_norm(*args)
        if func is aten._grouped_mm.default:
            return self._grouped_mm(*args, **kwargs)
        if fake_impls._is_tensor_constructor(func):
            return fake_impls.constructors(self, func, *args, **kwargs)
        devices: set[torch.device] = set()
        map_tree(lambda x: devices.add(x.fake_device) if isinstance(x, FakeTensor) else None, (args, kwargs))
        if len(devices) != 1 or kwargs.get("device") is not None or not _by_meta_kernel(func):
            return self.dispatch(func, types, args, kwargs)
        (device,) = devices
        try:
            plain = map_tree(lambda x: _meta(x) if isinstance(x, FakeTensor) else x, (args, kwargs))
            out = func(*plain[0], **plain[1])
        except NotImplementedError:
            return self.dispatch(func, types, args, kwargs)
        return map_tree(lambda x: FakeTensor(self, x, device) if isinstance(x, torch.Tensor) else x, out)

    def _layer_norm(self, x: torch.Tensor, normalized: list[int], weight: Any, bias: Any, eps: float) -> tuple:
        statistics = torch.float32 if _mixed((x, weight, bias)) else x.dtype
        ones = [*x.shape[: x.dim() - len(normalized)], *([1] * len(normalized))]
        kinds = (list(x.shape), x.dtype), (ones, statistics), (ones, statistics)
        return tuple(self._make(None, shape, _row_major(shape), 0, dtype, x.fake_device) for shape, dtype in kinds)

    def _grouped_mm(self, a: torch.Tensor, b: torch.Tensor, offs: Any = None, bias: Any = None, out_dtype: Any = None) -> torch.Tensor:
        """PyTorch's fake one takes bfloat16 only; the CPU's multiplies float32 and float16 too."""
        if a.dtype != b.dtype or a.shape[-1] != b.shape[-2] or (offs is None) != (a.dim() == b.dim() == 3):
            raise RuntimeError(
                f"grouped_mm: {a.dtype} {list(a.shape)} by {b.dtype} {list(b.shape)}, offs {None if offs is None else list(offs.shape)}; "
                f"expected one dtype, as many columns as rows, and offs unless both are batches."
            )
        lead = [offs.shape[0]] if a.dim() == b.dim() == 2 else [a.shape[0]] if a.dim() == b.dim() else []
        shape = [*lead, a.shape[-2], b.shape[-1]]
        return self._make(None, shape, _row_major(shape), 0, out_dtype or a.dtype, a.fake_device)

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
        map_tree(lambda x: given.append(storage_of(x)) if isinstance(x, torch.Tensor) else None, args)
        shared = [storage_of(r) in given for r in results]
        of_first = all(shared) and isinstance(args[0], torch.Tensor) and all(storage_of(r) == given[0] for r in results)
        if of_first or not any(shared) and not any(r.storage_offset() for r in results):
            types = [(r.shape, r.stride(), r.storage_offset(), r.dtype, r.device) for r in results]
            kind = None if results is not out else list if isinstance(out, list) else tuple
            self._seen[key] = kind, of_first, types

    def _make(self, storage: Any, shape: Any, strides: Any, offset: int, dtype: torch.dtype, device: Any) -> torch.Tensor:
        if storage is not None:
            return FakeTensor(self, _on_meta(storage, shape, strides, offset, dtype), device)
        with torch._C._DisableTorchDispatch():
            return FakeTensor(self, torch.empty_strided(shape, strides, dtype=dtype, device="meta"), device)


_STATIC = {
    aten.view.default, aten._unsafe_view.default, aten.slice.Tensor, aten.select.int, aten.embedding.default,
    aten.new_empty.default, aten.new_zeros.default, aten.new_ones.default, aten.new_full.default,
}  # fmt: skip
"""Operators of which PyTorch computes fake results by itself for the sake of symbolic sizes alone."""


@cache
def _by_meta_kernel(func: Any) -> bool:
    if func in _STATIC:
        return True
    apart = any(check(func) for check, _ in fake_impls.op_implementations_checks) or func in FakeTensorMode.lift_fns
    by_device = func in meta_table or func.overloadpacket in _NORMS  # Python's rules look whether it is a CPU
    return not apart and not by_device and fake_impls.has_meta(func)


def _meta(x: FakeTensor) -> torch.Tensor:
    """A plain tensor on the device "meta" that shares the storage of `x`, which has no memory."""
    return _on_meta(x.untyped_storage(), x.shape, x.stride(), x.storage_offset(), x.dtype)


def _on_meta(storage: Any, shape: Any, strides: Any, offset: int, dtype: torch.dtype) -> torch.Tensor:
    with torch._C._DisableTorchDispatch():
        return torch.empty(0, dtype=dtype, device="meta").set_(storage, offset, shape, strides)


def _row_major(shape: list[int]) -> list[int]:
    return [math.prod(max(n, 1) for n in shape[i + 1 :]) for i in range(len(shape))]


def _mixed(args: tuple) -> bool:
    x, *others = (a for a in args if isinstance(a, torch.Tensor))
    narrow = x.dtype in (torch.bfloat16, torch.float16) and x.device.type == "cpu"
    return narrow and any(a.dtype == torch.float32 for a in others)


def storage_of(x: torch.Tensor) -> int:
    """Tells apart the memory of tensors, fake ones too."""
    return x.untyped_storage()._cdata
