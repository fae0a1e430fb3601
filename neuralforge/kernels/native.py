"""A kernel's C file, built at first use, or ahead of it: `build_ahead` starts on all that this machine's cache hasn't got
while a program is still being captured."""

from __future__ import annotations

import ctypes
import sys
import threading
from functools import cached_property
from pathlib import Path

import torch

from ..errors import KernelError
from .toolchain import (
    cache_folder,
    fast_dot,
    has_amx,
    has_bfloat16,
    in_cache,
    isa,
    load,
    plain_operators_instead,
)

long = ctypes.c_long
LANES = {"amx": 16, "avx512": 16, "avx2": 8, "portable": 4}
"""Floats in a vector."""


def prelude() -> str:
    """What every C file begins with: the vector width of this machine, what it has for bfloat16, and `vector.h`."""
    has = {"AVX512_BF16": has_bfloat16(), "AMX": has_amx(), "BFLOAT16_DOT": fast_dot()}
    defines = [f"#define L {LANES[isa()]}\n", *(f"#define {name}\n" for name, here in has.items() if here)]
    return "".join(defines) + Path(__file__).with_name("vector.h").read_text()


_COMMON, TRANSPOSE, CELLS, AMX = (Path(__file__).with_name(f"{name}.h") for name in ("kernel", "transpose", "cells", "amx"))
_ALL: list[Native] = []
_building: dict[tuple[str, bool], threading.Thread] = {}  # by instruction set, and whether for bfloat16


class Native:
    """`library` is the loaded code of a C file that uses `vector.h`, `kernel.h` and `headers`; `defines` stands at its head."""

    def __init__(self, path: Path, *headers: Path, defines: str = ""):
        self.path, self.headers, self.defines = path, headers, defines
        self._loaded: dict[str, ctypes.CDLL] = {}
        self._lock = threading.Lock()
        _ALL.append(self)

    @property
    def source(self) -> str:
        """All that the compiler reads."""
        return prelude() + self.defines + "".join(file.read_text() for file in (_COMMON, *self.headers, self.path))

    @property
    def library(self) -> ctypes.CDLL:
        """Raises KernelError as the toolchain does."""
        with self._lock:
            if isa() not in self._loaded:
                self._loaded[isa()] = load(self.source, self.path.stem)
            return self._loaded[isa()]

    @cached_property
    def _works(self) -> bool:
        try:
            return self.library is not None
        except KernelError as e:
            plain_operators_instead(e)
            return False

    def available(self) -> bool:
        """Can it be built here?"""
        return self._works


def build_ahead(bfloat16: bool = False) -> None:
    """Start building the kernels that this machine's cache hasn't got, or their variants for bfloat16, on a thread of its own; says
    so, once a process. Without a compiler, or with a cache that can't be written to, does nothing."""
    if (isa(), bfloat16) in _building:
        return
    try:
        wanted = (n for n in _ALL if bool(n.defines) == bfloat16 and isa() not in n._loaded)
        missing = [n for n in wanted if not in_cache(n.source, n.path.stem)]
        if missing:
            cache_folder()  # warns here, on the user's thread, where it is no good
    except KernelError:  # told where a kernel is needed
        missing = []
    thread = _building[isa(), bfloat16] = threading.Thread(target=_build, args=(missing,))
    if missing:
        what = "kernels for bfloat16" if bfloat16 else "kernels"
        print(f"building the {what} for this machine, once: a few seconds", file=sys.stderr)
        thread.start()


def _build(kernels: list[Native]) -> None:
    for kernel in kernels:
        try:
            kernel.library  # noqa: B018
        except KernelError:  # told where it is needed
            pass


def built_ahead() -> None:
    """Return when nothing is being built any more, and times can be taken."""
    for thread in list(_building.values()):
        if thread.is_alive():
            thread.join()


def wide(dtype: torch.dtype) -> torch.dtype:
    """In what kernels compute with numbers of this type."""
    return torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype


def pointer(t: torch.Tensor | None) -> ctypes.c_void_p | None:
    """Where the numbers are; null for None."""
    return None if t is None else ctypes.c_void_p(t.data_ptr())

