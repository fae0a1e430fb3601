"""PyTorch's rules for the types of results without sympy, whose import takes 0.3 s and 33 MB.

They import it, and PyTorch's modules of symbolic shapes, at each call, to see whether sizes are symbols. Ours are numbers.
Within `numbers_only`, stand-ins are in their places that know this much, unless they are imported already; asked for
anything else, a stand-in makes room, imports the real module and answers with what that has.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from types import ModuleType
from typing import Any

import torch

_SHAPES = "torch.fx.experimental.symbolic_shapes"


class _StandIn(ModuleType):
    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # the import machinery looks whether it is a package
            raise AttributeError(name)
        _make_room()
        for module in _STAND_INS:  # whoever has kept one shall find the real module's own
            for known in (*_OF_NUMBERS, "Basic", "Max"):
                vars(module).pop(known, None)
        return getattr(import_module(self.__name__), name)


class _NoSymbol:
    """The class of symbols where there are none."""


def _equal(x: Any, y: Any) -> bool:
    return tuple(x) == tuple(y) if isinstance(x, (list, tuple)) and isinstance(y, (list, tuple)) else x == y


_OF_NUMBERS: dict[str, Callable] = {
    **dict.fromkeys(("expect_true", "guard_or_false", "guard_or_true", "guard_size_oblivious", "statically_known_true"), bool),
    "sym_and": lambda *conditions: all(conditions),
    "sym_or": lambda *conditions: any(conditions),
    "sym_eq": _equal,
    "is_nested_int": lambda x: False,
    "has_guarding_hint": lambda x: True,
    "guarding_hint_or_throw": lambda x: x,
    "free_unbacked_symbols": lambda x: set(),
    "compute_unbacked_bindings": lambda *args, **kwargs: None,
}
"""What functions on symbols do to numbers."""


_SYMBOLS = torch.SymBool, torch.SymInt, torch.SymFloat


def _for_numbers(name: str, f: Callable) -> Callable:
    """`f`; for symbols what it stands for, as whoever has imported it may keep it."""

    def call(*args: Any, **kwargs: Any) -> Any:
        found = any(isinstance(x, _SYMBOLS) for a in args for x in (a if isinstance(a, (list, tuple)) else (a,)))
        return getattr(_StandIn(_SHAPES), name)(*args, **kwargs) if found else f(*args, **kwargs)

    return call


def _stand_ins() -> list[_StandIn]:
    shapes, sympy, functions = _StandIn(_SHAPES), _StandIn("sympy"), _StandIn("torch.utils._sympy.functions")
    vars(shapes).update((name, _for_numbers(name, f)) for name, f in _OF_NUMBERS.items())
    vars(sympy).update(Basic=_NoSymbol)
    vars(functions).update(Max=_NoSymbol)  # imported where it isn't used
    return [shapes, sympy, functions]


_STAND_INS = _stand_ins()


def _make_room() -> None:
    for module in _STAND_INS:
        if sys.modules.get(module.__name__) is module:
            del sys.modules[module.__name__]


@contextmanager
def numbers_only() -> Iterator[None]:
    """For code that imports those modules and meets no symbols."""
    wanted = not any(module.__name__ in sys.modules for module in _STAND_INS)
    if wanted:
        sys.modules.update((module.__name__, module) for module in _STAND_INS)
    try:
        yield
    finally:
        if wanted:
            _make_room()
