"""A kernel's C file, built at first use."""

from __future__ import annotations

import ctypes
from functools import cached_property
from pathlib import Path

import torch

from ..errors import KernelError
from .toolchain import isa, load

long = ctypes.c_long
LANES = {"avx512": 16, "avx2": 8, "portable": 4}
"""Floats in a vector."""


def prelude() -> str:
    """What every C file begins with: the vector width of this machine, and `vector.h`."""
    return f"#define L {LANES[isa()]}\n" + Path(__file__).with_name("vector.h").read_text()


class Native:
    """`library` is the loaded code of a C file that uses `vector.h`."""

    def __init__(self, path: Path):
        self.path = path
        self._loaded: dict[str, ctypes.CDLL] = {}

    @property
    def library(self) -> ctypes.CDLL:
        """Raises KernelError as the toolchain does."""
        if isa() not in self._loaded:
            self._loaded[isa()] = load(prelude() + self.path.read_text(), self.path.stem)
        return self._loaded[isa()]

    @cached_property
    def _works(self) -> bool:
        try:
            return self.library is not None
        except KernelError:
            return False

    def available(self) -> bool:
        """Can it be built here?"""
        return self._works


def pointer(t: torch.Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(t.data_ptr())

