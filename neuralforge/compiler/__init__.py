"""The compiler: passes over the captured graph, the memory plan, and the executor."""

from .jit import jit

__all__ = ["jit"]
