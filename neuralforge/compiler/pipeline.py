"""The passes, in order."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from ..graph import Graph, verify
from .fuse import fuse
from .passes import common_subexpressions, dead_code, fold_constants, simplify, transpose_products

PASSES: list[Callable[[Graph], Graph]] = [
    simplify,
    dead_code,
    fold_constants,
    transpose_products,
    simplify,
    common_subexpressions,
    dead_code,
    fuse,
]


def optimise(graph: Graph) -> Graph:
    """The graph after all passes."""
    for _, graph in stages(graph):
        pass
    return graph


def stages(graph: Graph) -> Iterator[tuple[str, Graph]]:
    """Each pass's name with the graph after it; the verifier runs in between."""
    for transform in PASSES:
        graph = verify(transform(graph))
        yield transform.__name__, graph
