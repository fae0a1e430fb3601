"""The intermediate representation, and capture of Python functions into it."""

from .capture import Captured, capture
from .ir import Equation, Graph, Value
from .tracer import Tracer
from .verify import verify

__all__ = ["Captured", "Equation", "Graph", "Tracer", "Value", "capture", "verify"]
