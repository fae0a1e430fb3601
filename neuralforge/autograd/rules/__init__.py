"""Derivative rules, a file for each family of operators."""

from . import (  # noqa: F401  (they register themselves)
    activation,
    attention,
    choice,
    collectives,
    convolution,
    cross_entropy,
    distance,
    embedding,
    factorizations,
    fft,
    indexing,
    linalg,
    loss,
    nn,
    pointwise,
    pooling,
    reduction,
    rotary,
    scatter,
    shape,
    special,
    spectra,
)
from .table import (
    Derivative,
    Joint,
    definition,
    diagonal,
    find_definition,
    find_rule,
    identity,
    linear,
    nondifferentiable,
    rule,
    symmetric,
)

__all__ = [
    "Derivative", "Joint", "definition", "diagonal", "find_definition", "find_rule", "identity", "linear",
    "nondifferentiable", "rule", "symmetric",
]  # fmt: skip
