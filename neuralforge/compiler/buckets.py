"""Buckets: arguments of varying length padded up to a few sizes, so that a few compiled forms serve all lengths.

Padding changes what a function computes unless it masks what is padded, and nobody can see from a graph whether it
does. So each form is tried before it is trusted: its first padded call also runs the plain function on the arguments as
they are, and raises if the results differ by more than rounding. (jax.jit leaves padding to the user, and torch.compile
marks a dimension as dynamic; neither pads.)
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from copy import copy
from types import MethodType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch.utils._pytree import keystr, tree_flatten_with_path, tree_map

from ..errors import CaptureError, warn
from ..graph.source import user_line
from .compiled import Compiled
from .jitted import Jit, followed

TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-4}
"""Relative difference of an output, as a norm, that counts as rounding; 3e-2 for narrower types."""


class Length(NamedTuple):
    """A dimension of a padded argument in one call."""

    argument: str
    dim: int
    given: int
    bucket: int


class Bucketed:
    """A jitted function that pads arguments before, and cuts results after. See `nf.jit`."""

    def __init__(self, jitted: Jit, buckets: dict, pad: dict | None):
        self.jitted = jitted
        self.__wrapped__ = jitted.f
        self.parameters = list(inspect.signature(jitted.f).parameters)
        self.buckets = {str(name): _checked(name, dims) for name, dims in buckets.items()}
        self.values = {str(name): value for name, value in (pad or {}).items()}
        unknown = set(self.values) - set(self.buckets)
        if unknown:
            raise CaptureError(
                f"nf.jit: pad names {sorted(unknown)}; expected some of {sorted(self.buckets)}, which buckets has."
            )

    def __get__(self, instance: Any, owner: type | None = None) -> Any:
        return MethodType(self, instance) if instance is not None and hasattr(self.jitted.f, "__get__") else self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if followed():
            return self.jitted.f(*args, **kwargs)
        padded_args, padded_kwargs, lengths = self.padded(args, kwargs)
        if all(n.given == n.bucket for n in lengths):
            return self.jitted(*args, **kwargs)
        given = [n.given for n in lengths]
        pattern = tuple((given.index(n.given), n.given == n.bucket) for n in lengths)
        form, _ = self.jitted.form(padded_args, padded_kwargs)
        cuts = form.cuts.get(pattern)
        if cuts is None:
            out, cuts = self._try(form.program, args, kwargs, padded_args, padded_kwargs, lengths)
            form.cuts[pattern] = cuts
        else:
            out = self.jitted(*padded_args, **padded_kwargs)
        return _cut(out, cuts, lengths)

    def padded(self, args: tuple, kwargs: dict) -> tuple[tuple, dict, list[Length]]:
        """The arguments padded, and the lengths found."""
        args, kwargs, lengths = list(args), dict(kwargs), []
        for name, dims in self.buckets.items():
            first, *path = name.split(".")
            if first.isdigit():
                place = int(first)
                first = self.parameters[place] if place < len(self.parameters) else first
            else:
                place = self.parameters.index(first) if first in self.parameters else len(args)
            change = lambda t: self._pad(name, t, dims, lengths)  # noqa: B023
            if first in kwargs:
                kwargs[first] = _changed(kwargs[first], path, change, name)
            elif place < len(args):
                args[place] = _changed(args[place], path, change, name)
            elif first not in self.parameters:
                raise CaptureError(
                    f"{user_line()}: buckets names {name!r}; the function has {', '.join(self.parameters)}."
                )
        return tuple(args), kwargs, lengths

    def _pad(
        self, name: str, t: Any, dims: dict[int, tuple[int, ...]], lengths: list[Length]
    ) -> torch.Tensor:
        if not isinstance(t, torch.Tensor):
            raise CaptureError(
                f"{user_line()}: buckets names {name!r}, which is a {type(t).__name__}; expected a tensor."
            )
        value, more = self.values.get(name, 0), [0] * t.dim()
        if not (t.is_floating_point() or t.is_complex()) and value != int(value):
            raise CaptureError(
                f"{user_line()}: pad={{{name!r}: {value}}} for a tensor of {t.dtype}; expected a whole number."
            )
        for dim, sizes in dims.items():
            if not -t.dim() <= dim < t.dim():
                raise CaptureError(
                    f"{user_line()}: buckets pads dimension {dim} of {name!r}, which has {t.dim()} dimensions."
                )
            n = t.shape[dim]
            bucket = next((size for size in sizes if size >= n), None)
            if bucket is None:
                raise CaptureError(
                    f"{user_line()}: {name} has {n} along dimension {dim}, and its largest bucket is {sizes[-1]}. Add a larger "
                    f"one, or cut the argument."
                )
            lengths.append(Length(name, dim, n, bucket))
            more[dim] = bucket - n
        return F.pad(t, [m for extra in reversed(more) for m in (0, extra)], value=value) if any(more) else t

    def _try(
        self, program: Compiled, args: tuple, kwargs: dict, padded_args: tuple, padded_kwargs: dict, lengths: list[Length]
    ) -> tuple[Any, list[tuple[int, int, int]]]:
        """The results of the padded call, and how to cut them; raises CaptureError where they aren't those of the plain one.
        On copies: nothing is donated or written before it is clear that the call is right."""
        if program.closed:
            raise CaptureError(
                f"{user_line()}: the function that buckets pads for writes in place to a tensor of shape {tuple(program.closed[0].shape)} "
                f"that it closes over. Pass it as an argument, and return the new value."
            )
        with torch.random.fork_rng(devices=[]):
            before = torch.get_rng_state()
            expected = self._plain(args, kwargs, torch.clone)
            draws = not torch.equal(before, torch.get_rng_state())
        copies = tree_map(
            lambda x: x.clone() if isinstance(x, torch.Tensor) else x, (padded_args, padded_kwargs)
        )
        out = self.jitted(*copies[0], **copies[1])
        self._refuse_writes(copies, (padded_args, padded_kwargs), (args, kwargs))
        flat, tree = tree_flatten_with_path(out)
        plain, plain_tree = tree_flatten_with_path(expected)
        told = ", ".join(
            f"{n.argument} from {n.given} to {n.bucket} along dimension {n.dim}"
            for n in lengths
            if n.given != n.bucket
        )
        if tree != plain_tree:
            raise CaptureError(
                f"{user_line()}: padding {told} changes the structure of the result; expected the same for all lengths."
            )
        cuts = []
        for i, ((path, found), (_, wanted)) in enumerate(zip(flat, plain)):
            where = f"output{keystr(path)}"
            if not isinstance(found, torch.Tensor):
                if found != wanted:
                    raise CaptureError(
                        f"{user_line()}: padding {told} makes {where} {found!r} instead of {wanted!r}."
                    )
                continue
            for dim, (p, n) in enumerate(zip(found.shape, wanted.shape)):
                if p == n:
                    continue
                match = next(
                    (k for k, length in enumerate(lengths) if (length.given, length.bucket) == (n, p)), None
                )
                if match is None:
                    raise CaptureError(
                        f"{user_line()}: padding {told} makes {where} of shape {tuple(found.shape)} instead of "
                        f"{tuple(wanted.shape)}: it isn't clear which part of dimension {dim} to return. Return results in which "
                        f"the padded dimension stands alone, or pad by hand."
                    )
                cuts.append((i, dim, match))
        if draws:
            warn(
                "nf.jit(buckets=...): the function draws random numbers, so its padded results can't be compared with plain "
                "ones; only their shapes are."
            )
        else:
            names = [keystr(path) for path, _ in flat]
            self._compare(args, kwargs, _leaves(_cut(out, cuts, lengths)), [x for _, x in plain], names, told)
        return out, cuts

    def _refuse_writes(self, copies: tuple, padded: tuple, given: tuple) -> None:
        """Raises CaptureError if the call wrote to a padded argument: the caller's own would stay as it was."""
        for copied, before, own in zip(_leaves(copies), _leaves(padded), _leaves(given)):
            if before is not own and isinstance(own, torch.Tensor) and _apart(copied, before):
                if id(before) not in self._donated(padded[0]):
                    raise CaptureError(
                        f"{user_line()}: the function writes in place to an argument that buckets pads, of shape "
                        f"{tuple(own.shape)}. Return the new value instead."
                    )

    def _donated(self, args: tuple) -> set[int]:
        return {id(x) for n in self.jitted.donate if n < len(args) for x in _leaves(args[n])}

    def _plain(self, args: tuple, kwargs: dict, copied: Callable) -> Any:
        args, kwargs = tree_map(
            lambda x: copied(x.detach()) if isinstance(x, torch.Tensor) else x, (args, kwargs)
        )
        with torch.no_grad():
            return self.jitted.f(*args, **kwargs)

    def _compare(
        self, args: tuple, kwargs: dict, found: list, expected: list, names: list[str], told: str
    ) -> None:
        """Raises CaptureError where results differ by more than rounding may have done. How much that is for an output (a
        step of Adam turns the sign of a gradient that is nought but rounding into a whole step) is seen from running the
        plain function on arguments that differ in their last bits."""
        scale = max((_rms(x) for x in expected if isinstance(x, torch.Tensor)), default=0.0)
        wrong = [i for i in range(len(found)) if _apart(found[i], expected[i]) > _allowed(expected[i], scale)]
        if not wrong:
            return
        signs = torch.Generator().manual_seed(0)

        def nudged(x: torch.Tensor) -> torch.Tensor:
            if not x.is_floating_point():
                return x.clone()
            up = torch.randint(0, 2, x.shape, generator=signs) * 2 - 1
            return x * (1 + up * torch.finfo(x.dtype).eps).to(x.dtype)

        with torch.random.fork_rng(devices=[]):
            other = _leaves(self._plain(args, kwargs, nudged))
        for i in wrong:
            apart = _apart(found[i], expected[i])
            if apart > _allowed(expected[i], scale) + 10 * _apart(other[i], expected[i]):
                raise CaptureError(
                    f"{user_line()}: padding {told} changes the result: output{names[i]} is off by "
                    f"{apart / max(_rms(expected[i]), 1e-300):.1e} of its size. Mask what is padded: a pad of -100 for targets is "
                    f"left out by cross_entropy's ignore_index, attention needs is_causal or a mask, a mean must divide by what "
                    f"isn't padded. Or give another value with pad=, or pad by hand."
                )


def _checked(name: Any, dims: Any) -> dict[int, tuple[int, ...]]:
    told = f"nf.jit: buckets={{{name!r}: {dims!r}}}; expected {{dimension: (size, size, ...)}} with growing sizes, as {{1: (128, 256)}}."
    if not isinstance(dims, dict) or not dims:
        raise CaptureError(told)
    for dim, sizes in dims.items():
        whole = isinstance(sizes, (tuple, list)) and all(type(n) is int and n > 0 for n in sizes)
        if type(dim) is not int or not whole or not sizes or list(sizes) != sorted(set(sizes)):
            raise CaptureError(told)
    return {dim: tuple(sizes) for dim, sizes in dims.items()}


def _changed(tree: Any, path: list[str], change: Callable, name: str) -> Any:
    """The tree with its leaf at `path` changed; the containers on the way are copied."""
    if not path:
        return change(tree)
    key: Any = path[0] if isinstance(tree, dict) else int(path[0]) if path[0].isdigit() else None
    try:
        inner = tree[key]
    except (KeyError, IndexError, TypeError) as e:
        raise CaptureError(
            f"{user_line()}: buckets names {name!r}, and there is no {path[0]!r} in the argument."
        ) from e
    inner = _changed(inner, path[1:], change, name)
    if isinstance(tree, tuple):
        items = [*tree[:key], inner, *tree[key + 1 :]]
        return type(tree)(*items) if hasattr(tree, "_fields") else tuple(items)
    new = copy(tree)
    new[key] = inner
    return new


def _leaves(tree: Any) -> list:
    return [x for _, x in tree_flatten_with_path(tree)[0]]


def _cut(out: Any, cuts: list[tuple[int, int, int]], lengths: list[Length]) -> Any:
    """Results without what was padded."""
    if not cuts:
        return out
    flat, tree = torch.utils._pytree.tree_flatten(out)
    for i, dim, length in cuts:
        flat[i] = flat[i].narrow(dim, 0, lengths[length].given)
    return torch.utils._pytree.tree_unflatten(flat, tree)


def _rms(x: torch.Tensor) -> float:
    x = x.detach()
    if not (x.is_floating_point() or x.is_complex()) or not x.numel():
        return 0.0
    x = x.abs().double().nan_to_num(0.0, 0.0, 0.0)
    return (x.square().mean()).sqrt().item()


def _allowed(x: Any, scale: float) -> float:
    """Root mean square difference that rounding explains; `scale` is that of the largest output."""
    if not isinstance(x, torch.Tensor) or not x.is_floating_point():
        return 0.0
    return TOLERANCE.get(x.dtype, 3e-2) * _rms(x) + torch.finfo(x.dtype).eps * scale


def _apart(a: Any, b: Any) -> float:
    """Root mean square difference; of whole numbers the share that differs. Infinite where only one is nan or infinite."""
    if not isinstance(a, torch.Tensor) or not a.numel():
        return 0.0
    a, b = a.detach(), b.detach()
    if not (a.is_floating_point() or a.is_complex()):
        return (a != b).double().mean().item()
    same = (a == b) | (a.isnan() & b.isnan())
    apart = torch.where(same, 0.0, (a.to(torch.complex128) - b.to(torch.complex128)).abs())
    found = apart.square().mean().sqrt().item()
    return math.inf if math.isnan(found) else found
