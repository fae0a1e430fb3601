"""Layers written out: a linear layer as a product and an addition, an embedding as indexing."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ...graph.ir import Value
from .patterns import Match, Program
from .views import reshaped

aten = torch.ops.aten


def linear_by_hand(program: Program) -> Iterator[Match]:
    """x @ w + bias, of a bias for each column: the product's sums begin with it."""
    for eq in program.graph.equations:
        if eq.op is not aten.add.Tensor or eq.kwargs:
            continue
        for product, bias in (eq.args, eq.args[::-1]):
            made, view = program.trace(product) if isinstance(product, Value) else (None, ())
            mm = program.producer(made, aten.mm.default)
            if mm is None or not isinstance(bias, Value) or bias.dtype != made.dtype or bias.fake.dim() != 1:
                continue
            columns = made.shape[1:]  # the rows may be split over several dimensions
            if product.shape[-1:] != columns or bias.shape != columns or eq.outputs.shape != product.shape:
                continue
            if not reshaped(view, made.shape, product.shape):
                continue
            shape = list(product.shape)
            x, w = mm.args
            replacement = lambda env, x=x, w=w, bias=bias, shape=shape: [torch.addmm(env[bias], env[x], env[w]).view(shape)]
            equations = program.between([eq.outputs], {x, w, bias})
            yield Match(equations, [eq.outputs], replacement, f"{x.shape[0]} rows, {bias.shape[0]} columns", ("linear", tuple(shape)))
            break


def embedding_by_index(program: Program) -> Iterator[Match]:
    """weight[indices], rows of a matrix: its derivative adds rows, for which there is a kernel."""
    for eq in program.graph.equations:
        if eq.op is not aten.index.Tensor or len(eq.args[1]) != 1:
            continue
        weight, (indices,) = eq.args
        if weight.fake.dim() != 2 or not weight.dtype.is_floating_point or indices.dtype != torch.int64:
            continue
        rows = weight.shape[0]

        def replacement(env: dict[Value, torch.Tensor], weight=weight, indices=indices, rows=rows) -> list[torch.Tensor]:
            at = env[indices]  # counted from the end, if negative
            return [torch.embedding(env[weight], torch.where(at < 0, at + rows, at))]

        yield Match([eq], [eq.outputs], replacement, f"of {rows} rows", ("embedding", rows))
