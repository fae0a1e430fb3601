"""From a captured function to a program that runs it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

import torch
from torch.utils._pytree import TreeSpec

from ..errors import CaptureError
from ..graph import Captured, Graph
from ..graph.source import user_line
from ..kernels.native import build_ahead
from ..memory import Arena, give_pages_back, paused_collector
from . import on_disk
from .executor import Program
from .kernels import built, claim
from .passes.rewrites import Rewrites
from .pipeline import optimise, without_autocast
from .planning.remat import rematerialise
from .products.candidates import choose_products
from .products.column_sums import join_column_sums
from .products.epilogue import join_epilogues
from .products.prologue import groups_for_prologues, join_prologues
from .storage import copied, extent


class Compiled:
    """A captured function with its optimised graph and its program."""

    @paused_collector()
    @without_autocast()
    def __init__(
        self, captured: Captured, donated: list[int], memory_budget: int | None, max_rewrites: int | None = None,
        arena: Arena | None = None,
    ):  # fmt: skip
        if any(v.dtype == torch.bfloat16 for eq in captured.graph.equations for v in eq.results):
            build_ahead(bfloat16=True)
        rewrites = Rewrites(max_rewrites)
        graph = _optimised(captured.graph, rewrites)
        made, refused = len(rewrites.made), len(rewrites.refused)
        self.out_tree: TreeSpec = captured.out_tree
        self._rebuild = _rebuilding(captured.out_tree)
        self.writes, self.closed = captured.writes, captured.closed
        # What the function itself writes to can't be given away.
        self.donated = [i for i in donated if i not in captured.writes]
        products = choose_products(graph.equations)
        kernels = claim(graph) | products.kernels
        given = [graph.inputs[i] for i in self.donated]

        with rewrites.noting():
            graph, joined = join_epilogues(graph, products, groups_for_prologues(graph, kernels))
            graph, summed = join_column_sums(graph, products)
            kernels |= joined | summed
            graph, early = join_prologues(graph, kernels)
            kernels |= early
        graph, kernels = rematerialise(graph, kernels, given, memory_budget)
        with rewrites.noting():
            graph, late = join_prologues(graph, kernels)
        kernels = built(graph, kernels | late)
        self.graph = graph
        self.rewrites, self.refused = rewrites.made[made:], rewrites.refused[refused:]  # those after the passes
        give_pages_back()  # what compiling took, and timing, would count for the whole run
        self.program = Program(graph, kernels, given, arena)
        self._complex = any(v.dtype.is_complex for v in graph.inputs)
        self._apart: list[int] | None = None  # where the tensors of a call lay that don't overlap

    @property
    def outside(self) -> list[torch.Tensor]:
        """The tensors that it closes over, and constants of its own."""
        return [*self.graph.constants.values(), *self.closed]

    def __call__(self, tensors: list[torch.Tensor]) -> Any:
        given = tensors
        if any(map(torch.Tensor.is_neg, tensors)) or self._complex and any(map(torch.Tensor.is_conj, tensors)):
            # Kernels read memory, where such a view isn't negated or conjugated yet.
            pending = [t.is_neg() or t.is_conj() for t in tensors]
            given = [copied(t) if p else t for t, p in zip(tensors, pending)]
        if self.writes or self.closed:
            check_apart(tensors, self.writes, self.closed)
        if self.donated:
            at = [t.data_ptr() for t in given]
            if at != self._apart:  # shapes and strides are the same in every call
                if _overlapping(tensors, self.donated):
                    given = list(given)
                    for i in self.donated:
                        given[i] = copied(given[i])
                else:
                    self._apart = at
        flat = self.program(*given)
        written = [*(tensors[i] for i in self.writes), *self.closed]
        count = len(flat) - len(written)
        for tensor, new in zip(written, flat[count:]):
            with torch.no_grad():
                tensor.copy_(new)
        return self._rebuild(iter(flat[:count]))


def _optimised(graph: Graph, rewrites: Rewrites) -> Graph:
    """After all passes: as found on disk, unless rewrites are limited."""
    place = on_disk.place_of(graph) if rewrites.limit is None else None
    found = on_disk.find(place, graph) if place else None
    if found is not None:
        return found
    optimised = optimise(graph, rewrites)
    if place:
        on_disk.save(place, optimised, graph)
    return optimised


def _rebuilding(tree: TreeSpec) -> Callable[[Iterator[Any]], Any]:
    """`tree_unflatten` for one tree, from an iterator of the leaves; made once, as every call needs it."""
    if tree.is_leaf():
        return next
    keys, parts = tree.context, [_rebuilding(child) for child in tree.children()]
    if tree.type is dict and all(part is next for part in parts):
        return lambda leaves: dict(zip(keys, leaves))  # keys first: else zip takes a leaf too many
    if tree.type is dict:
        return lambda leaves: {key: part(leaves) for key, part in zip(keys, parts)}
    if tree.type in (tuple, list):
        return lambda leaves: tree.type([part(leaves) for part in parts])
    return lambda leaves: tree.unflatten(list(islice(leaves, tree.num_leaves)))


def _overlapping(tensors: list[torch.Tensor], donated: list[int]) -> bool:
    """Does a donated tensor share its memory with another argument?"""
    seen = [t.untyped_storage().data_ptr() for t in tensors]
    if len(set(seen)) == len(seen):
        return False
    count = Counter(seen)
    return any(count[seen[i]] > 1 and tensors[i].numel() for i in donated)


def check_apart(tensors: list[torch.Tensor], writes: list[int], closed: list[torch.Tensor]) -> None:
    """Raises CaptureError if one of the arguments that are written, or of the tensors that the function closes over and writes to, shares
    its memory with an argument, which would then see the write at once in eager code, and not in a graph."""
    ends = [(t.data_ptr(), t.data_ptr() + extent(t.shape, t.stride()) * t.element_size()) for t in (*tensors, *closed)]
    for i in (*writes, *range(len(tensors), len(ends))):
        for j, (begin, end) in enumerate(ends):
            if i != j and begin < ends[i][1] and ends[i][0] < end:
                what = "an argument" if i < len(tensors) else "a tensor that it closes over,"
                raise CaptureError(
                    f"{user_line()}: the function writes in place to {what} of shape {tuple((*tensors, *closed)[i].shape)} whose memory "
                    f"another one, of shape {tuple((*tensors, *closed)[j].shape)}, shares. Pass a clone of one of them, or return the new "
                    f"value instead of writing it."
                )
