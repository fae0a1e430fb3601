"""Products with epilogues: a fused group that reads a matrix product runs on its tiles while they are in the cache.

The product is then computed by our kernel, which calls the group's code for each finished tile. It is in memory as a
whole only if something else reads it too. That is worth the difference where another kernel is a little faster: what a
pass over the result takes was timed together with the candidates (`candidates.py`).
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable

import torch

from ...graph import verify
from ...graph.ir import Equation, Graph, Value, leaves, substitute
from ...kernels import matmul
from ..fusion.codegen import as_planned, epilogue_source, sizes_and_strides
from ..fusion.fused import Fused
from ..fusion.group import LOOKED_THROUGH
from ..fusion.layout import Layout
from ..joined import Joined
from ..kernels import Kernel
from ..passes.rewrites import make
from ..space import contiguous
from .candidates import Products, product_operands

aten = torch.ops.aten

KEPT = 1 / 3
"""What is saved where the product is written to memory all the same, as a share of the time to copy it: reading it."""


class Product(Joined):
    """The operator of a matrix product and the group that reads it: called, it interprets `graph`. `part` is the group,
    whose first input is the product."""

    def __init__(self, product: Equation, part: Graph, group: Fused):
        self.part, self.product = part, product
        tile, *others = part.inputs
        result = Value(f"{tile.name}_whole", product.outputs.fake)
        whole = Equation(product.op, product.args, product.kwargs, result, product.source, product.origin)
        seen = Equation(aten.view.default, (result, list(tile.shape)), {}, tile)
        inputs = list(dict.fromkeys([*product.inputs, *others]))
        graph = Graph(inputs=inputs, equations=[whole, seen, *part.equations], outputs=part.outputs)
        super().__init__(f"product_{group.name}", f"the product's epilogue: {group.why}", graph)
        self.layout = Layout(part, columns=product.outputs.shape[1])

    @property
    def tile(self) -> int | None:
        """Which operand of the layout the product is, if it is read once and as it lies."""
        places = [i for i, (v, _) in enumerate(self.layout.operands) if v is self.part.inputs[0]]
        expected, size = [], 1
        for n in reversed(self.layout.sizes):
            expected.insert(0, size)
            size *= n
        rows = len(places) == 1 and list(self.layout.operands[places[0]][1]) == expected
        return places[0] if rows and size == self.product.outputs.fake.numel() else None

    def may_overwrite(self, output: Value, operand: Value) -> bool:
        """Other tiles still need the product's operands."""
        alone = operand not in self.product.inputs and operand in self.part.inputs
        return alone and self.layout.may_overwrite(output, operand)

    def kernel(self) -> Kernel:
        """To be built."""
        text, shape, a = epilogue_source(self.layout, self.tile), tuple(self.product.outputs.shape), product_operands(self.product)[0]
        scratch = matmul.scratch_bytes(shape, a.shape[1], a.dtype, epilogue=True)
        return Kernel(
            may_overwrite=self.may_overwrite, scratch=lambda eq: scratch, takes_prologues=True, code=lambda: [text],
            bind=lambda built: self._bound(built[text]),
        )  # fmt: skip

    def _bound(self, function: ctypes._CFuncPtr) -> Callable:
        """What runs, given the compiled `epilogue_source`."""
        a, b, bias = product_operands(self.product)
        inputs, outputs = self.graph.inputs, self.part.outputs
        sizes = sizes_and_strides(self.layout)
        sizes, numbers = (ctypes.c_long * len(sizes))(*sizes), matmul.layout(a.fake, b.fake, None)
        at = {v: i for i, v in enumerate([*inputs, *outputs])}
        read = [at.get(v) for v, _ in self.layout.operands] + [at[r.value] for r in self.layout.results]
        own = [at[a], at[b], None if bias is None else at[bias]]
        pointers, operands = ctypes.c_void_p * len(read), ctypes.c_void_p * 5
        core, blocks = ctypes.cast(matmul.entry(a.dtype), ctypes.c_void_p), matmul.blocks(a.shape[0], a.dtype)
        function.argtypes, function.restype = [ctypes.c_void_p] * 5 + [ctypes.c_long], None

        def run(outputs: tuple, tensors: tuple, kwargs: dict, prologues: matmul.Prologues = matmul.NONE) -> None:
            where = [t.data_ptr() for t in (*as_planned(tensors, inputs), *outputs)]
            find = lambda places: [None if i is None else where[i] for i in places]
            made = [p and ctypes.addressof(p) for p in prologues]
            function(pointers(*find(read)), sizes, core, operands(*find(own), *made), numbers, blocks)

        return run


def join_epilogues(
    graph: Graph, products: Products, prologues: frozenset[Equation] = frozenset()
) -> tuple[Graph, dict[Equation, Kernel]]:
    """Products and the groups that read them joined, where that is worth it; and the kernels of these equations.
    `products` tells what that costs and saves. Of `prologues`, groups that other products can make, none is joined to a product
    that is in memory all the same: what it makes needn't be, then."""
    position = {eq: i for i, eq in enumerate(graph.equations)}
    users, results = graph.users(), set(leaves(graph.outputs))
    joined: dict[int, list[Equation]] = {}  # at the group's position, what is there instead
    gone: set[Equation] = set()
    for product in [eq for eq in graph.equations if eq in products.extra and eq.outputs.fake.dim() == 2]:
        views = views_of(product.outputs, users)
        seen = {product.outputs, *(view.outputs for view in views)}
        readers = sorted(
            ((position[eq], v, eq) for v in seen for eq in users.get(v, []) if eq not in views), key=lambda reader: reader[0]
        )
        if not readers or product in gone:
            continue
        at, read, group = readers[0]
        kept = len(readers) > 1 or not seen.isdisjoint(results)
        if group in gone or any(eq is group for _, _, eq in readers[1:]) or kept and group in prologues:
            continue
        op = _combined(product, group, read, kept)
        if op is None or products.extra[product] > products.copy[product] * (KEPT if kept else 1):
            continue
        if not make("epilogue", group.source, op.why):
            continue
        joined[at] = [op.equation(group.source, "join_epilogues")]
        if kept:  # the group gives what it reads; the product is a view of that, and its other views follow
            if read is not product.outputs:
                shape = list(product.outputs.shape)
                joined[at].append(Equation(aten.view.default, (read, shape), {}, product.outputs, product.source, "join_epilogues"))
            joined[at] += [view for view in views if view.outputs is not read]
        gone |= {product, group, *views}
    equations: list[Equation] = []
    for i, eq in enumerate(graph.equations):
        if i in joined:
            equations += joined[i]
        elif eq not in gone:
            equations.append(eq)
    return verify(graph.replace(equations=equations)), {eq: eq.op.kernel() for eq, *_ in joined.values()}


def views_of(v: Value, users: dict[Value, list[Equation]]) -> list[Equation]:
    """The views of all of `v`, and of those, in their order."""
    found = []
    for eq in users.get(v, []):
        if eq.op in LOOKED_THROUGH and isinstance(eq.outputs, Value) and eq.outputs.fake.numel() == v.fake.numel():
            found += [eq, *views_of(eq.outputs, users)]
    return found


def _combined(product: Equation, group: Equation, read: Value, kept: bool) -> Product | None:
    """The two as one operator, which also gives the product, as it was `read`, if it is `kept`. None if the group
    doesn't run along the rows of the product."""
    if not isinstance(group.op, Fused) or len(group.op.parts) != 1 or not contiguous(product.outputs) or not contiguous(read):
        return None
    part, layout = group.op.parts[0], group.op.layouts[0]
    rows, columns = product.outputs.shape
    if not layout.fits_rows(columns) or any(r.kind == "all" for r in layout.results):
        return None
    whole_rows = any(n.fold for n in layout.nodes) or any(r.kind == "row" for r in layout.results)
    if whole_rows and columns > matmul.most_columns(product.outputs.dtype):
        return None
    inner = part.inputs[group.args.index(read)]
    tile = Value(f"{inner.name}_tile", inner.fake)
    env = {inner: tile}
    if kept:
        equations = [Equation(aten.clone.default, (tile,), {}, inner, product.source), *part.equations]
        outputs = [inner, *part.outputs]
    else:
        equations = [
            Equation(eq.op, substitute(eq.args, env), substitute(eq.kwargs, env), eq.outputs, eq.source, eq.origin)
            for eq in part.equations
        ]
        outputs = list(part.outputs)
    others = [v for v in part.inputs if v is not inner]
    op = Product(product, Graph(inputs=[tile, *others], equations=equations, outputs=outputs), group.op)
    return op if op.tile is not None and rows else None
