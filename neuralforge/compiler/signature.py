"""What tells one call of a jitted function from another: the structure of its arguments, and each leaf."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import fields, is_dataclass
from typing import Any

import numpy as np
import torch

from ..errors import CaptureError
from ..graph.refused import check_dense
from ..graph.source import user_line
from ..graph.tree import taken_apart, tree_flatten


def flatten(tree: Any) -> tuple[list, Any]:
    """The leaves, in tree_flatten's order, and a hashable that tells the structure. Every call does this, for hundreds of
    leaves: plain containers are taken apart here, as tree_flatten and a TreeSpec's hash take far longer."""
    leaves: list = []

    def structure(x: Any) -> Any:
        kind = type(x)
        if isinstance(x, torch.Tensor):
            leaves.append(x)
            return None
        if kind is dict or kind is OrderedDict:
            return kind, tuple(x), tuple([structure(value) for value in x.values()])
        if kind is tuple or kind is list:
            return kind, tuple([structure(value) for value in x])
        if is_dataclass(x) and (parts := taken_apart(x)) is not None:
            values, (names, static) = parts
            return kind, names, tuple([(name, signature(value)) for name, value in static]), tuple([structure(v) for v in values])
        inner, spec = tree_flatten(x)
        leaves.extend(inner)
        return spec

    return leaves, structure(tree)


def signature(leaf: Any) -> Any:
    """A hashable that is equal for leaves for which the same program holds, if there is one. Equality of Python's won't do: 1 == True ==
    1.0, 0.0 == -0.0, nan != nan, and slices have no hash before Python 3.12."""
    kind = type(leaf)
    if isinstance(leaf, torch.Tensor):
        check_dense(leaf)
        return leaf.shape, leaf.stride(), leaf.dtype, leaf.device
    if isinstance(leaf, (float, complex, slice, np.generic)):
        return kind, repr(leaf)
    if kind in (tuple, list):
        return kind, tuple([signature(x) for x in leaf])
    if kind is set:
        return kind, frozenset(leaf)
    if is_dataclass(leaf) and kind is not type and kind.__dataclass_params__.eq:
        return kind, tuple([signature(getattr(leaf, field.name, None)) for field in fields(leaf)])
    return kind, leaf


def check_hashable(key: Any) -> None:
    """Raises CaptureError if what a jitted function was given can't be told from other things."""
    try:
        hash(key)
    except TypeError as e:
        unhashable = _unhashable(key)
        raise CaptureError(
            f"{user_line()}: an argument of nf.jit holds {unhashable!r} ({type(unhashable).__name__}), which is "
            f"neither a tensor nor hashable. Pass tensors, numbers, strings, or pytrees of them."
        ) from e


def _unhashable(key: Any) -> Any:
    """What it is in a tuple of tuples that has no hash."""
    for part in key if isinstance(key, tuple) else ():
        try:
            hash(part)
        except TypeError:
            return _unhashable(part)
    return key
