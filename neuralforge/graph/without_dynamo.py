"""PyTorch's fake tensors without torch._dynamo, whose import takes a second.

They want it for two things: a setting that is None unless somebody who has it imported sets it, and to be told apart from
the code that it compiles. Until somebody imports it, the setting is known and there is no such code: `postpone` says so
in its stead. When it is imported after all, what was said is taken back first.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from importlib import import_module
from types import CellType, FunctionType
from typing import Any

import torch
import torch._refs
from torch._compile import _disable_dynamo
from torch._decomp import global_decomposition_table

_MARK = "__dynamo_disable"  # where _disable_dynamo's wrapper keeps what torch._dynamo makes of the wrapped function
_WRAPPER = _disable_dynamo(lambda: None).__code__
_lock = threading.Lock()


class _NotYet:
    """A module that hasn't been imported, for those who ask for what is `known` of it. All else imports it."""

    def __init__(self, name: str, **known: Any):
        self.__dict__.update(known, _name=name)

    def __getattr__(self, name: str) -> Any:
        return getattr(import_module(self._name), name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(import_module(self._name), name, value)


class _Watch:
    """On sys.meta_path: takes everything back when torch._dynamo is about to be imported."""

    def __init__(self, stand_in: Any, marked: list[Callable]):
        self.stand_in, self.marked = stand_in, marked

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        if name == "torch._dynamo":
            with _lock:
                if self in sys.meta_path:
                    sys.meta_path.remove(self)
                if vars(torch).get("_dynamo") is self.stand_in:
                    del torch._dynamo
                for f in self.marked:
                    if f.__dict__.get(_MARK) is f:
                        delattr(f, _MARK)


def postpone() -> None:
    """Called before fake tensors are used; does nothing where torch._dynamo is imported already, or the second time."""
    with _lock:
        if "torch._dynamo" in sys.modules or any(isinstance(finder, _Watch) for finder in sys.meta_path):
            return
        marked = [f for f in _wrapped() if _MARK not in f.__dict__]
        stand_in = _NotYet("torch._dynamo", config=_NotYet("torch._dynamo.config", _custom_ops_profile=None))
        sys.meta_path.insert(0, _Watch(stand_in, marked))
        for f in marked:
            setattr(f, _MARK, f)
        torch._dynamo = stand_in


def _wrapped() -> list[Callable]:
    """The functions that compute the types of operators' results and are kept from torch._dynamo. They lie below other
    wrappers, which hold them in their closures."""
    tables = (*global_decomposition_table.values(), vars(torch._refs), vars(torch._refs.nn.functional))
    found, seen = [], set()
    left = [f for table in tables for f in table.values()]
    while left:
        f = left.pop()
        if isinstance(f, FunctionType) and f not in seen:
            seen.add(f)
            inside = [c.cell_contents for c in f.__closure__ or () if _filled(c)]
            left += inside
            if f.__code__ is _WRAPPER:
                found += [g for g in inside if isinstance(g, FunctionType)]
    return found


def _filled(cell: CellType) -> bool:
    try:
        return cell.cell_contents is not None
    except ValueError:  # a name that has no value yet
        return False
