"""Pytrees: PyTorch's, and dataclasses.

A dataclass that holds tensors is a node of the tree as soon as one is met. Its tensors, and containers, are children; the
other fields (names, numbers, None) belong to the structure, so that a gradient has them as they are.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch.utils import _pytree
from torch.utils._pytree import GetAttrKey, TreeSpec, tree_unflatten

__all__ = ["TreeSpec", "leaves_like", "tree_flatten", "tree_flatten_with_path", "tree_leaves", "tree_map", "tree_unflatten"]


def tree_flatten(tree: Any, is_leaf: Callable[[Any], bool] | None = None) -> tuple[list, TreeSpec]:
    leaves, spec = _pytree.tree_flatten(tree, is_leaf)
    return _pytree.tree_flatten(tree, is_leaf) if _learn(leaves) else (leaves, spec)


def tree_flatten_with_path(tree: Any) -> tuple[list, TreeSpec]:
    _learn(_pytree.tree_leaves(tree))
    return _pytree.tree_flatten_with_path(tree)


def leaves_like(spec: TreeSpec, tree: Any) -> list:
    """The leaves of a tree of this structure, in its order: dictionaries may have their keys in another. Raises ValueError for any
    other structure."""
    _learn(_pytree.tree_leaves(tree))
    found = spec.flatten_up_to(tree)
    more = next((x for x in found if not _pytree.tree_flatten(x)[1].is_leaf()), None)
    if more is not None:
        raise ValueError(f"a {type(more).__name__} where a leaf is expected")
    return found


def tree_leaves(tree: Any) -> list:
    return tree_flatten(tree)[0]


def tree_map(f: Callable, tree: Any, *more: Any) -> Any:
    _learn(_pytree.tree_leaves(tree))
    return _pytree.tree_map(f, tree, *more)


def taken_apart(x: Any) -> tuple[list, tuple] | None:
    """The children of a dataclass with tensors in it, and their names and the other fields; None for another one."""
    _learn([x])
    return _dataclasses[type(x)](x) if type(x) in _dataclasses else None


_dataclasses: dict[type, Callable] = {}


def _learn(leaves: list) -> bool:
    """Register the dataclasses with tensors in them among the leaves, and those inside; True if there were any."""
    found = False
    for leaf in leaves:
        if not isinstance(leaf, torch.Tensor) and is_dataclass(leaf) and not isinstance(leaf, (type, torch.nn.Module)):
            inside = tree_leaves([getattr(leaf, field.name, None) for field in fields(leaf)])
            if type(leaf) not in _pytree.SUPPORTED_NODES and any(isinstance(x, torch.Tensor) for x in inside):
                _register(type(leaf))
                found = True
    return found


def _register(cls: type) -> None:
    arguments = {field.name for field in fields(cls) if field.init}
    # Once a field has held a tensor it is always a child: the tree stays the same with other things in their places.
    children: set[str] = set()

    def take_apart(x: Any) -> tuple[list, tuple]:
        values = {field.name: getattr(x, field.name, None) for field in fields(cls)}
        children.update(k for k, v in values.items() if isinstance(v, torch.Tensor) or type(v) in _pytree.SUPPORTED_NODES)
        names = tuple(k for k in values if k in children)
        return [values[k] for k in names], (names, tuple((k, v) for k, v in values.items() if k not in children))

    def with_keys(x: Any) -> tuple[list, tuple]:
        values, context = take_apart(x)
        return [(GetAttrKey(name), value) for name, value in zip(context[0], values)], context

    def put_together(values: Any, context: tuple) -> Any:
        known = {**dict(zip(context[0], values)), **dict(context[1])}
        x = cls(**{name: value for name, value in known.items() if name in arguments})
        for name, value in known.items():
            if name not in arguments:
                object.__setattr__(x, name, value)
        return x

    _dataclasses[cls] = take_apart
    _pytree.register_pytree_node(cls, take_apart, put_together, flatten_with_keys_fn=with_keys)
