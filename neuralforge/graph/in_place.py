"""In-place operators as pure ones: the functional twin of each, and writes through views."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import cache
from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import _disable_current_modes

from ..errors import CaptureError
from .ir import map_tree
from .operators import operator_traits
from .source import user_line

aten = torch.ops.aten

# In-place operators whose functional twin has another name or overload.
_TWINS: dict[str, Any] = {
    "aten::bernoulli_.float": lambda x, p=0.5, **kwargs: aten.bernoulli.p(x, p, **kwargs),
    "aten::normal_": aten.normal_functional.default,
    "aten::_native_batch_norm_legit": aten._native_batch_norm_legit_functional.default,
    "aten::_batch_norm_with_update": aten._batch_norm_with_update_functional.default,
    "aten::rrelu_with_noise": aten.rrelu_with_noise_functional.default,
    "aten::rrelu_with_noise_": aten.rrelu_with_noise_functional.default,
    "aten::polygamma_": lambda x, n: aten.polygamma.default(n, x),
    "aten::conj_physical_": aten._conj_physical.default,
}


def _native_batch_norm(
    x: torch.Tensor, weight: Any, bias: Any, running_mean: Any, running_var: Any, training: bool, momentum: float, eps: float
) -> tuple:
    if not training:
        return aten._native_batch_norm_legit_no_training(x, weight, bias, running_mean, running_var, momentum, eps)
    if running_mean is None:
        return aten._native_batch_norm_legit.no_stats(x, weight, bias, True, momentum, eps)
    return aten._native_batch_norm_legit(x, weight, bias, running_mean, running_var, True, momentum, eps)


UNDECLARED = {aten.native_batch_norm.default: _native_batch_norm}
"""Operators that write to arguments, and whose schemas don't say so, by others."""


def functional(func: Any, args: tuple, kwargs: dict, given: Callable = lambda x: x) -> tuple[list[tuple], Any]:
    """An operator that writes to its arguments, computed without writing: the pairs of a written tensor and its new value,
    and what the operator returns. `given(x)` is what to read for a tensor among the arguments."""
    groups = [kwargs[name] if at is None else args[at] for name, at in operator_traits(func).written]
    targets = [t for group in groups for t in (group if isinstance(group, (list, tuple)) else [group])]
    args, kwargs = map_tree(given, args), map_tree(given, kwargs)
    values, result = _twin(func, args, kwargs, len(targets))
    # A twin may hand back its argument (conj_physical of what is real); the written tensor has memory of its own.
    values = [aten.clone.default(v) if any(v is x for x in args) else v for v in values]
    if result is None and func._schema.returns:
        result = groups[0] if len(func._schema.returns) == 1 else tuple(groups)
    return list(zip(targets, values)), result


def _twin(func: Any, args: tuple, kwargs: dict, count: int) -> tuple[list[torch.Tensor], Any]:
    """The new values of the `count` written tensors, and what the operator returns if that isn't the written tensors."""
    name, overload = func._schema.name.split("::")[1], func._schema.overload_name
    twin = _TWINS.get(func._schema.name + (f".{overload}" if overload else ""))
    written = {name for name, _ in operator_traits(func).written}
    if twin is None:
        namespace = getattr(torch.ops, func.namespace)
        packet = getattr(namespace, name.removesuffix("_"), None)
        if written & {a.name for a in func._schema.arguments if a.is_out}:  # mm.out -> mm, sum.IntList_out -> sum.dim_IntList
            kwargs = {k: v for k, v in kwargs.items() if k not in written}
            new = packet(*args, **kwargs)
            return (list(new) if isinstance(new, (tuple, list)) else [new]), None
        twin = _overload(func, packet) if name.endswith("_") else None
    if twin is None:
        raise CaptureError(
            f"{user_line()}: {func} writes in place and has no functional twin. Use an operator that returns a new "
            f"tensor, or wrap the code in a torch.library custom operator that declares no mutation."
        )
    new = twin(*args, **kwargs)
    outputs = list(new) if isinstance(new, (tuple, list)) else [new]
    if outputs and isinstance(outputs[0], list):  # a foreach operator returns a list for each written list
        outputs = [t for group in outputs for t in group]
    if len(outputs) > count:  # a functional twin returns the results, then the new values
        rest = outputs[:-count]
        return outputs[-count:], rest[0] if len(rest) == 1 else tuple(rest)
    return outputs, None


@cache
def _overload(func: Any, packet: Any) -> Any:
    """The overload of `packet` that takes what the in-place operator takes, which may have another name (floor_divide_.Tensor,
    floor_divide); if none does, that of the same name."""
    if packet is None:
        return None
    own = getattr(packet, func._schema.overload_name or "default", None)
    overloads = [own, *(getattr(packet, name) for name in packet.overloads())]
    types = lambda f: [str(a.type) for a in f._schema.arguments]
    return next((f for f in overloads if f is not None and types(f) == types(func)), own)


class Link(NamedTuple):
    """How a view was made: `view = func(base, *args, **kwargs)[index]`."""

    base: torch.Tensor
    func: Callable
    args: tuple
    kwargs: dict
    index: int | None

    @property
    def unsafe(self) -> bool:
        """Is it one of parts that know nothing of each other? PyTorch's recurrent cells write to such: read again from the base, with the
        other parts' writes, each would depend on all."""
        return self.func.overloadpacket in _UNSAFE

    def replay(self, base: torch.Tensor) -> torch.Tensor:
        out = self.func(base, *self.args, **self.kwargs)
        return out if self.index is None else out[self.index]


_UNSAFE = {aten.unsafe_split, aten.unsafe_split_with_sizes}


def scatter(link: Link, base: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """`base` with the elements that the view `link` shows replaced by `value`: the inverse of a view."""
    func, args, kwargs, index = link.func, link.args, link.kwargs, link.index
    packet = func.overloadpacket
    if func is aten.view.dtype:
        return value.view(base.dtype)
    if packet in _RESHAPES:
        return value.reshape(base.shape)
    if packet is aten.slice:
        return aten.slice_scatter(base, value, *args, **kwargs)
    if packet is aten.select:
        return aten.select_scatter(base, value, *args)
    if packet is aten.index:
        return aten.index_put(base, *args, value)
    if packet is aten.diagonal:
        return aten.diagonal_scatter(base, value, *args, **kwargs)
    if packet is aten.as_strided:
        return aten.as_strided_scatter(base, value, *args)
    if packet is aten.t:
        return value.t()
    if packet is aten.transpose:
        return value.transpose(*args)
    if packet is aten.permute:
        dims = [d % base.dim() for d in args[0]]
        return value.permute([dims.index(i) for i in range(len(dims))])
    if packet is aten.unbind:
        return aten.select_scatter(base, value, args[0] if args else 0, index)
    if packet in (aten.split, aten.split_with_sizes, *_UNSAFE):
        dim = args[1] if len(args) > 1 else kwargs.get("dim", 0)
        sizes = args[0]
        start = index * sizes if isinstance(sizes, int) else sum(sizes[:index])
        return aten.slice_scatter(base, value, dim, start, start + value.shape[dim])
    if packet is aten.view_as_real:
        return torch.view_as_complex(value)
    if packet is aten.view_as_complex:
        return torch.view_as_real(value)
    if packet is aten._conj:
        return value.conj()
    if packet is aten._neg_view:
        return value.neg()
    raise CaptureError(
        f"{user_line()}: an in-place write through a view made by {func} can't be expressed as a pure operator. "
        f"Write to the tensor itself, or build a new tensor."
    )


def laid_out_like(x: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """`value` with the strides of `x`, as a write leaves them, for views that follow; as it is where `x` has gaps."""
    strides = [(n > 1) * s for n, s in zip(x.shape, x.stride())]
    if strides == [(n > 1) * s for n, s in zip(value.shape, value.stride())] or x.layout != torch.strided:
        return value
    order = sorted(range(x.dim()), key=lambda d: -x.stride(d))
    laid = value.permute(order).contiguous().permute([order.index(d) for d in range(x.dim())])
    return laid if strides == [(n > 1) * s for n, s in zip(laid.shape, laid.stride())] else value


_RESHAPES = {
    aten.view, aten._unsafe_view, aten._reshape_alias, aten.alias, aten.detach, aten.squeeze, aten.unsqueeze,
    aten.lift_fresh,
}  # fmt: skip

VIEWS_IN_PLACE = {"t_", "transpose_", "squeeze_", "unsqueeze_", "swapaxes_"}
RESHAPING = VIEWS_IN_PLACE | {"resize_", "resize_as_", "set_", "as_strided_"}
"""Operators that change a tensor's shape in place."""


def hand_over(x: torch.Tensor, new: torch.Tensor) -> None:
    """Give the C++ handle of `x`, a temporary of PyTorch's own C++ functions, to the Python object `new`, a view of it.
    The object `x`, which derivative rules may hold, stays as it was."""
    with _disable_current_modes():
        with getattr(x, "fake_mode", nullcontext()):  # PyTorch's own way to do it on fake tensors imports a second of modules
            old = x.detach()
        torch._C._swap_tensor_impl(x, new)
        new.set_(x)
        x.set_(old)
