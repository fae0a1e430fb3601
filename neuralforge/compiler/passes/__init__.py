"""Passes: functions from graph to graph."""

from .constants import fold_constants
from .simplify import common_subexpressions, dead_code, simplify

__all__ = ["common_subexpressions", "dead_code", "fold_constants", "simplify"]
