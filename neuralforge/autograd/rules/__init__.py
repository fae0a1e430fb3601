"""Derivative rules, a file for each family of operators."""

from . import indexing, linalg, nn, pointwise, reduction, shape  # noqa: F401  (they register themselves)
from .table import (
    Derivative,
    Joint,
    definition,
    diagonal,
    find_definition,
    find_rule,
    linear,
    nondifferentiable,
    rule,
)

__all__ = [
    "Derivative", "Joint", "definition", "diagonal", "find_definition", "find_rule", "linear", "nondifferentiable", "rule",
]  # fmt: skip
