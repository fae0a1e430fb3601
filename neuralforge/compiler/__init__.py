"""The compiler: passes over the captured graph, the memory plan, and the executor."""

from .explain import explain
from .jit import jit

__all__ = ["explain", "jit"]
