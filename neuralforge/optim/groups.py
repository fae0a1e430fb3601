"""Parameters by name: which optimizer takes which."""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Any

import torch

from ..errors import ConfigError
from ..graph.tree import tree_flatten_with_path, tree_unflatten
from .base import Optimizer


def groups(optimizers: Mapping[str, Optimizer]) -> Optimizer:
    """Each parameter by the first optimizer whose pattern matches its name: shell patterns, `*.bias`, `blocks.0.*`, `*`.
    Names are the keys along the way to a leaf, joined by dots, so those of `model.named_parameters()` for a dict of them.

        groups({"*.bias": adamw(lr, weight_decay=0.0), "embedding.*": chain(adamw(lr), scale(0.5)), "*": adamw(lr)})

    The state is a tuple, one for each pattern. `init` raises ConfigError for a parameter that no pattern matches and for a
    pattern that gets none.
    """

    def split(tree: Any) -> list[dict[str, torch.Tensor]]:
        parts: list[dict[str, torch.Tensor]] = [{} for _ in optimizers]
        for name, leaf in named_leaves(tree).items():
            n = next((n for n, pattern in enumerate(optimizers) if fnmatchcase(name, pattern)), None)
            if n is None:
                raise ConfigError(
                    f"groups: no pattern matches the parameter {name}; the patterns are {', '.join(optimizers)}. Add one for it, or '*' last."
                )
            parts[n][name] = leaf
        return parts

    def join(parts: Any, like: Any) -> Any:
        found = {name: leaf for part in parts for name, leaf in part.items()}
        paths, tree = tree_flatten_with_path(like)
        return tree_unflatten([found[path_name(path)] for path, _ in paths], tree)

    def init(params: Any) -> tuple:
        parts = split(params)
        for pattern, part in zip(optimizers, parts):
            if not part:
                names = ", ".join(list(named_leaves(params))[:8])
                raise ConfigError(
                    f"groups: the pattern {pattern!r} gets no parameter: none matches, or earlier patterns take all. "
                    f"Names look like {names}."
                )
        return tuple(o.init(part) for o, part in zip(optimizers.values(), parts))

    def update(grads: Any, state: tuple, params: Any, **extra: Any) -> tuple[Any, tuple]:
        rows = zip(optimizers.values(), split(grads), state, split(params), _split_extra(extra, params, split), strict=True)
        results = [o.update(g, s, p, **e) for o, g, s, p, e in rows]
        return join([updates for updates, _ in results], params), tuple(new for _, new in results)

    def evaluate(params: Any, state: tuple) -> Any:
        return join([o.evaluate(p, s) for o, p, s in zip(optimizers.values(), split(params), state, strict=True)], params)

    return Optimizer(init, update, evaluate)


def _split_extra(extra: dict[str, Any], params: Any, split: Any) -> list[dict[str, Any]]:
    """Extra arguments for each group: a pytree like the parameters is split as they are."""
    names, count = set(named_leaves(params)), len(split(params))
    parts: list[dict[str, Any]] = [{} for _ in range(count)]
    for key, value in extra.items():
        like = value is not None and not isinstance(value, torch.Tensor) and set(named_leaves(value)) == names
        for part, own in zip(parts, split(value) if like else [value] * count):
            part[key] = own
    return parts


def named_leaves(tree: Any) -> dict[str, Any]:
    """The leaves of a pytree by the keys on the way to them, joined by dots."""
    return {path_name(path): leaf for path, leaf in tree_flatten_with_path(tree)[0]}


def path_name(path: tuple) -> str:
    return ".".join(str(getattr(key, "key", getattr(key, "idx", getattr(key, "name", key)))) for key in path)
