"""Which line of the user's code an operation comes from."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

_PACKAGE = Path(__file__).parent.parent
# The machinery between the user's line and the operator; models, optimizers and trainer count as user code.
_MACHINERY = tuple(str(_PACKAGE / part) for part in ("graph", "autograd", "compiler", "testing", "kernels", "random"))
_SKIP = (*_MACHINERY, str(Path(torch.__file__).parent), "<")

_override: list[tuple[str, str]] = []
capturing = 0
"""How many captures are under way; looking up lines is too slow to do on every eager operation."""


def user_line() -> str:
    """`path/model.py:41` of the innermost frame outside torch and the transforms; the last two parts of the path."""
    if _override:
        return _override[-1][0]
    frame = sys._getframe(1)
    while frame is not None:
        filename = frame.f_code.co_filename
        if not filename.startswith(_SKIP):
            return "/".join(filename.rsplit("/", 2)[-2:]) + f":{frame.f_lineno}"
        frame = frame.f_back
    return ""


def line_of(error: BaseException) -> str:
    """The same of the innermost such frame that an error has passed through."""
    found, trace = "", error.__traceback__
    while trace is not None:
        filename = trace.tb_frame.f_code.co_filename
        if not filename.startswith(_SKIP):
            found = "/".join(filename.rsplit("/", 2)[-2:]) + f":{trace.tb_lineno}"
        trace = trace.tb_next
    return found


def origin() -> str:
    """What is making operations just now: "" (the user's own call), "vjp of aten.mul", "recomputed"."""
    return _override[-1][1] if _override else ""


@contextmanager
def attributed(source: str, origin: str) -> Iterator[None]:
    """Operations made inside carry this source line and origin, not those of the calling frame."""
    _override.append((source, origin))
    try:
        yield
    finally:
        _override.pop()
