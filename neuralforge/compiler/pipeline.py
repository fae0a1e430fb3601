"""The passes, in order."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from ..graph import Graph, verify
from .fusion.batch import batch
from .fusion.fuse import fuse
from .fusion.parts_in_place import parts_in_place
from .passes import (
    common_subexpressions,
    dead_code,
    fold_constants,
    rewrite_patterns,
    simplify,
    transpose_products,
)
from .passes.attention_strides import attention_reads_in_place, attention_writes_in_place
from .passes.descend import descend
from .passes.join_losses import join_losses
from .passes.join_products import join_products
from .passes.loss_head import chunk_loss_heads
from .passes.narrow import narrow_losses
from .passes.parts import concatenate_stacks, join_gradients, join_writes
from .passes.results import own_results
from .passes.rewrites import Rewrites

PASSES: list[Callable[[Graph], Graph]] = [
    descend,
    rewrite_patterns,
    simplify,
    dead_code,
    fold_constants,
    transpose_products,
    simplify,
    common_subexpressions,
    narrow_losses,
    dead_code,
    join_losses,
    chunk_loss_heads,
    dead_code,
    join_gradients,
    join_writes,
    concatenate_stacks,
    join_products,
    attention_reads_in_place,
    attention_writes_in_place,
    fuse,
    parts_in_place,
    batch,
]


def optimise(graph: Graph, rewrites: Rewrites | None = None) -> Graph:
    """The graph after all passes. `rewrites` notes and limits what patterns and fusion do."""
    return list(stages(graph, rewrites))[-1][1]


def stages(graph: Graph, rewrites: Rewrites | None = None) -> Iterator[tuple[str, Graph]]:
    """Each pass's name with the graph after it; the verifier runs in between."""
    rewrites = rewrites or Rewrites()
    captured = graph
    for transform in PASSES:
        with rewrites.noting(), without_autocast():
            graph = verify(transform(graph))
        yield transform.__name__, graph
    yield own_results.__name__, verify(own_results(graph, captured))


@contextmanager
def without_autocast() -> Iterator[None]:
    """Operators as they stand in a graph: the casts of the autocast around a call are captured already."""
    with torch._C._DisableAutocast():
        yield
