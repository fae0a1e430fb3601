"""The passes, in order."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from ..graph import Graph, verify
from .batch import batch
from .fuse import fuse
from .passes import (
    claim_cross_entropy,
    common_subexpressions,
    dead_code,
    fold_constants,
    simplify,
    transpose_products,
)

PASSES: list[Callable[[Graph], Graph]] = [
    simplify,
    dead_code,
    fold_constants,
    transpose_products,
    simplify,
    common_subexpressions,
    dead_code,
    claim_cross_entropy,
    fuse,
    batch,
]


def optimise(graph: Graph) -> Graph:
    """The graph after all passes."""
    return list(stages(graph))[-1][1]


def stages(graph: Graph) -> Iterator[tuple[str, Graph]]:
    """Each pass's name with the graph after it; the verifier runs in between."""
    for transform in PASSES:
        graph = verify(transform(graph))
        yield transform.__name__, graph
