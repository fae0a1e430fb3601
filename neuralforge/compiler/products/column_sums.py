"""Gradients of biases, made by the product that makes the weight's: it reads the same gradient, and sums it up as it packs it.

Where another product made the gradient, its epilogue sums it up already (`epilogue.py`), before it leaves the cache. This is for
the rest: that of attention, of a loss, of what a user gives.
"""

from __future__ import annotations

import torch

from ...graph import verify
from ...graph.ir import Equation, Graph, Value
from ...kernels import matmul
from ..joined import Joined
from ..kernels import Kernel
from ..passes.dataflow import Dataflow
from ..passes.rewrites import make
from ..space import contiguous
from .candidates import Products
from .epilogue import views_of

aten = torch.ops.aten


class ProductAndSums(Joined):
    """The operator of a product x^T y and of the sums of x's columns: called, it interprets `graph`."""

    def __init__(self, product: Equation, total: Equation):
        inputs = list(dict.fromkeys([*product.inputs, *total.inputs]))
        self.product = product
        graph = Graph(inputs=inputs, equations=[product, total], outputs=[product.outputs, total.outputs])
        super().__init__("product_and_sums", "a product, with the sums of the columns of what it reads", graph)

    def kernel(self) -> Kernel:
        product, places = self.product, self.graph.inputs
        a, b = (places.index(v) for v in product.args)
        shape, K = tuple(product.outputs.shape), product.args[0].shape[1]
        scratch = matmul.scratch_bytes(shape, K, product.outputs.dtype, sums=True)

        def run(outputs: tuple, inputs: tuple, kwargs: dict, prologues: matmul.Prologues = matmul.NONE) -> None:
            matmul.forward(outputs[:1], (inputs[a], inputs[b]), {}, sums=outputs[1], prologues=prologues)

        return Kernel(run, scratch=lambda eq: scratch, takes_prologues=True)


def join_column_sums(graph: Graph, products: Products) -> tuple[Graph, dict[Equation, Kernel]]:
    """Products by our kernel joined with the sums of columns of their transposed left operands; and the new kernels."""
    own = [eq for eq in graph.equations if eq in products.own and eq.op is aten.mm.default and _fits(eq)]
    totals = [eq for eq in graph.equations if _sums_columns(eq)]
    if not own or not totals:
        return graph, {}
    flow, pairs = Dataflow(graph), {}
    gradients = {_memory(flow, flow.producers[eq.args[0]].args[0]): eq for eq in own if _transposed(flow, eq)}
    gradients.pop(None, None)
    for total in totals:
        product = gradients.get(_memory(flow, total.args[0]))
        if product is None or product in pairs:
            continue
        at, views = flow.position[product], views_of(total.outputs, flow.users)
        readers = [eq for v in (total, *views) for eq in flow.users.get(v.outputs, ()) if eq not in views]
        if any(flow.position[eq] < at for eq in readers) or flow.place(total.args[0]) > at:
            continue
        if make("column_sums", total.source, f"{total.outputs.fake.numel()} columns, with the product {product.source}"):
            pairs[product] = total, views
    kernels: dict[Equation, Kernel] = {}
    equations, gone = [], {eq for total, views in pairs.values() for eq in (total, *views)}
    for eq in graph.equations:
        if eq in pairs:
            total, views = pairs[eq]
            op = ProductAndSums(eq, total)
            new = op.equation(eq.source, "join_column_sums")
            kernels[new] = op.kernel()
            equations += [new, *views]
        elif eq not in gone:
            equations.append(eq)
    return verify(graph.replace(equations=equations)), kernels


def _fits(product: Equation) -> bool:
    return product.outputs.dtype == torch.float32 and contiguous(product.outputs)


def _transposed(flow: Dataflow, product: Equation) -> bool:
    maker = flow.producers.get(product.args[0])
    return maker is not None and maker.op is aten.t.default


def _sums_columns(eq: Equation) -> bool:
    """Is it the sum over all dimensions but the last, of float32?"""
    if eq.op is not aten.sum.dim_IntList or eq.kwargs or eq.args[0].dtype != torch.float32 or not eq.args[1]:
        return False
    ndim = eq.args[0].fake.dim()
    return ndim > 1 and sorted(d % ndim for d in eq.args[1]) == list(range(ndim - 1))


def _memory(flow: Dataflow, v: Value) -> tuple[Value, int] | None:
    """What `v` is all of, and of how many columns."""
    whole = flow.whole(v)
    return None if whole is None else (whole, v.shape[-1])
