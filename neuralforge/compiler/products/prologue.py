"""Products with prologues: a fused group, or a cast, that makes a factor of products runs as they pack it, part by part, and the
factor is never in memory: weights cast for autocast, activations computed again for the backward pass.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from ...graph import verify
from ...graph.ir import Equation, Graph, Value
from ...graph.operators import draws
from ...kernels import matmul
from ..fusion.codegen import as_planned, prologue_source, sizes_and_strides
from ..fusion.fused import Fused
from ..fusion.layout import Layout
from ..joined import Joined
from ..kernels import Kernel
from ..passes.dataflow import Dataflow
from ..passes.rewrites import make
from ..pointwise import price
from ..space import contiguous
from ..storage import is_view, root_of, view_roots
from .candidates import product_operands
from .column_sums import ProductAndSums
from .epilogue import Product

aten = torch.ops.aten

AGAIN = 16
"""Additions for each number, at most, that are made again because products pack a factor more than once: writing a number
to memory and reading it takes longer."""


@dataclass(eq=False)
class Maker:
    """`group`, an equation whose only result is the factor, laid out in `rows` of the factor's memory; `views` lead from it to
    what the products read."""

    group: Equation
    layout: Layout
    views: list[Equation]

    @cached_property
    def source(self) -> str:
        return prologue_source(self.layout)

    def bind(self, function: ctypes._CFuncPtr, inputs: list[Value]) -> Callable[[tuple], matmul.Prologue]:
        """Makes the prologue, from tensors laid out as `inputs`, of the compiled `source`."""
        numbers = sizes_and_strides(self.layout)
        sizes = (ctypes.c_long * len(numbers))(*numbers)
        outside = dict(zip(self.group.op.graph.inputs, self.group.args))
        read = [inputs.index(outside[v]) for v, _ in self.layout.operands]
        whole = [i for i, (_, strides) in enumerate(self.layout.operands) if strides == self.layout.results[0].strides]
        size = self.layout.operands[whole[0]][0].fake.element_size() if whole else 0
        places, address = ctypes.c_void_p * len(read), ctypes.cast(function, ctypes.c_void_p).value

        def prologue(tensors: tuple) -> matmul.Prologue:
            at = [tensors[i].data_ptr() for i in read]
            made = matmul.Prologue(address, 0, ctypes.addressof(sizes), at[whole[0]] if whole else 0, size)
            made.kept = places(*at)  # as long as the structure that points to it
            made.pointers = ctypes.addressof(made.kept)
            return made

        return prologue


class Prologued(Joined):
    """The operator of a product, which may have an epilogue, and of the groups that make its factors: called, it interprets
    `graph`."""

    def __init__(self, product: Equation, makers: dict[Value, Maker]):
        self.product, self.makers = product, makers
        name = "_".join(maker.group.op.name for maker in makers.values()) + "_into_" + product.name.removeprefix("aten.")
        why = f"the product's prologue: {next(iter(makers.values())).group.op.why}"
        steps = dict.fromkeys(eq for maker in makers.values() for eq in (maker.group, *maker.views))
        inside = {v for eq in steps for v in eq.results}
        inputs = dict.fromkeys(v for eq in (*steps, product) for v in eq.inputs if v not in inside)
        super().__init__(name, why, Graph(inputs=list(inputs), equations=[*steps, product], outputs=list(product.results)))

    def kernel(self, product: Kernel) -> Kernel:
        """To be built, given that of the product alone."""
        own = {v for maker in self.makers.values() for v in maker.group.inputs}
        return Kernel(
            may_overwrite=lambda output, operand: operand not in own and product.may_overwrite(output, operand),
            scratch=lambda eq: product.scratch(self.product),
            code=lambda: [*product.code(), *(maker.source for maker in self.makers.values())],
            bind=lambda built: self._bound(product.built(built), built),
        )

    def _bound(self, kernel: Kernel, built: dict[str, Any]) -> Callable:
        """What runs, given the product's kernel and the compiled sources."""
        product, inputs = self.product, self.graph.inputs
        prologues = [
            self.makers[v].bind(built[self.makers[v].source], inputs) if v in self.makers else None for v in factors(product)
        ]
        shapes = {v: torch.empty_strided(v.shape, v.strides, dtype=v.dtype, device="meta") for v in self.makers}
        given = [shapes[v] if v in shapes else inputs.index(v) for v in product.args]

        def run(outputs: tuple, tensors: tuple, kwargs: dict) -> None:
            tensors = as_planned(tensors, inputs)
            args = tuple(tensors[x] if isinstance(x, int) else x for x in given)
            kernel.run(outputs, args, kwargs, prologues=tuple(p and p(tensors) for p in prologues))

        return run


def factors(product: Equation) -> tuple[Value, Value]:
    """The two values that are multiplied, as the equation reads them."""
    if not isinstance(product.op, (Product, ProductAndSums)):
        return product_operands(product)[:2]
    outside = dict(zip(product.op.graph.inputs, product.args))
    a, b, _ = product_operands(product.op.product)
    return outside[a], outside[b]


def groups_for_prologues(graph: Graph, kernels: dict[Equation, Kernel]) -> frozenset[Equation]:
    """The fused groups that `join_prologues` would join as things are."""
    return frozenset(eq for eq, _ in _found(graph, kernels) if isinstance(eq.op, Fused))


def join_prologues(graph: Graph, kernels: dict[Equation, Kernel]) -> tuple[Graph, dict[Equation, Kernel]]:
    """Groups joined with the products that alone read what they make, and the kernels of these equations."""
    makers: dict[Equation, dict[Value, Maker]] = {}
    gone: set[Equation] = set()
    for eq, found in _found(graph, kernels):
        if make("prologue", eq.source, found[0][2].group.op.why):
            gone |= {eq, *(view for _, _, maker in found for view in maker.views)}
            for product, v, maker in found:
                makers.setdefault(product, {})[v] = maker
    if not makers:
        return graph, {}
    made: dict[Equation, Kernel] = {}
    equations: list[Equation] = []
    for eq in graph.equations:
        if eq in makers:
            op = Prologued(eq, makers[eq])
            new = op.equation(eq.source, "join_prologues")
            made[new] = op.kernel(kernels[eq])
            eq = new
        if eq not in gone:
            equations.append(eq)
    return verify(graph.replace(equations=equations)), made


def _found(graph: Graph, kernels: dict[Equation, Kernel]) -> Iterator[tuple[Equation, list[tuple[Equation, Value, Maker]]]]:
    """Equations that products can make on the way; and the products, the factors, and what makes these."""
    flow, roots = Dataflow(graph), view_roots(graph)
    last = {root_of(roots, v): i for i, eq in enumerate(graph.equations) if not is_view(eq) for v in eq.inputs}
    for eq in graph.equations:
        group = _group(eq)
        readers = _readers(flow, group.results[0], kernels) if group is not None else None
        makers = _made(group, readers) if readers else None
        if not makers:
            continue
        until = max(flow.position[product] for product, _, _ in readers)
        read = {root_of(roots, v) for v in group.inputs}
        longer = [v for v in read if v in flow.producers and v not in flow.results and last[v] < until]
        if sum(v.nbytes for v in longer) <= group.results[0].nbytes:  # they live on in its place
            yield eq, [(product, v, maker) for (product, v, _), maker in zip(readers, makers)]


def _group(eq: Equation) -> Equation | None:
    """The equation, or a cast as a group of its own, if it makes one contiguous value and draws nothing."""
    if isinstance(eq.op, Fused):
        alone = len(eq.op.parts) == 1 and len(eq.results) == 1 and not draws(eq.op, eq.args, eq.kwargs)
        return eq if alone and contiguous(eq.results[0]) else None
    if eq.op is not aten._to_copy.default or not contiguous(eq.outputs) or not contiguous(eq.args[0]):
        return None
    if (eq.args[0].dtype, eq.outputs.dtype) != (torch.float32, torch.bfloat16):
        return None
    op = Fused([Graph(inputs=[eq.args[0]], equations=[eq], outputs=[eq.outputs])], "a cast")
    return Equation(op, (eq.args[0],), {}, (eq.outputs,), eq.source, eq.origin)


def _readers(flow: Dataflow, v: Value, kernels: dict[Equation, Kernel]) -> list[tuple[Equation, Value, list[Equation]]] | None:
    """The products, what of them `v` is, and the views in between; None if anything else reads `v`."""
    if v in flow.results:
        return None
    found = []
    for eq in flow.users.get(v, []):
        if is_view(eq):
            if not isinstance(eq.outputs, Value) or eq.outputs.fake.numel() != v.fake.numel():
                return None
            further = _readers(flow, eq.outputs, kernels)
            if further is None:
                return None
            found += [(product, x, [eq, *views]) for product, x, views in further]
        elif eq in kernels and kernels[eq].takes_prologues and v in factors(eq) and _times_read(eq, v) == 1:
            found.append((eq, v, []))
        else:
            return None
    return found


def _times_read(product: Equation, v: Value) -> int:
    """How often `v` is read by the product and what is joined to it."""
    if not isinstance(product.op, Joined):
        return product.inputs.count(v)
    inside = product.op.graph.inputs[product.args.index(v)]
    return sum(eq.inputs.count(inside) for eq in product.op.graph.equations)


def _made(group: Equation, readers: list[tuple[Equation, Value, list[Equation]]]) -> list[Maker] | None:
    """For each reader what makes its factor, if that is worth it."""
    result, part, first = group.results[0], group.op.parts[0], group.op.layouts[0]
    work, times, found = sum(price(eq) for eq in part.equations if not is_view(eq)), 0, []
    for product, v, views in readers:
        a, b = factors(product)
        left, summed = v is a, isinstance(product.op, ProductAndSums)
        (rows, columns), strides = v.shape, tuple(v.strides)
        if a is b or left and summed or min(rows, columns) < 2 or v.dtype != result.dtype:
            return None
        if strides == (1, rows):
            columns = rows
        elif strides != (columns, 1):
            return None
        if not first.fits_rows(columns):
            return None
        layout = Layout(part, columns=columns)
        if len(layout.loops) != 1 or any(n.fold for n in layout.nodes) or layout.results[0].kind != "full" or layout.kept:
            return None
        found.append(Maker(group, layout, views))
        packed = matmul.times_packed(a.shape[0], b.shape[1], v.dtype, isinstance(product.op, Product), summed)
        times += packed[0 if left else 1]
    return found if work * (times - 1) <= AGAIN else None
