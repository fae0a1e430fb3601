"""Layers written out: a linear layer as a product and an addition, an embedding as indexing; and products of rows in one order
that others want in another, as in `nn.MultiheadAttention`."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ...graph.ir import Value
from .dataflow import Dataflow
from .patterns import Match
from .views import Dims, Run, arrange, compose, inverse, natural

aten = torch.ops.aten


def batches_by_one_matrix(flow: Dataflow) -> Iterator[Match]:
    """x @ w of a batch and one matrix, which PyTorch repeats for each of the batch where it can't view all rows as those of
    one: one product of them all, in the order in which they lie in memory. The matrix's derivative is one product then too."""
    for eq in flow.graph.equations:
        if eq.op is not aten.bmm.default:
            continue
        x, repeated = eq.args
        w, (batch, *dims) = flow.trace(repeated)
        if any(run.axis is not None for run in batch) or any(run.axis is None for dim in dims for run in dim):
            continue

        def replacement(env: dict[Value, torch.Tensor], x=x, w=w, dims=tuple(dims)) -> list[torch.Tensor]:
            swapped = env[x].stride(0) < env[x].stride(1)
            rows = env[x].transpose(0, 1) if swapped else env[x]
            y = torch.mm(rows.flatten(0, 1), arrange(env[w], dims)).unflatten(0, rows.shape[:2])
            return [y.transpose(0, 1) if swapped else y]

        equations = flow.between([eq.outputs], {x, w})
        yield Match(equations, [eq.outputs], replacement, f"{x.shape[0]} times {x.shape[1]} rows", ("one matrix", tuple(dims)))


def linear_by_hand(flow: Dataflow) -> Iterator[Match]:
    """x @ w + bias, of a bias for each column: the product's sums begin with it."""
    for eq in flow.graph.equations:
        if eq.op is not aten.add.Tensor or eq.kwargs:
            continue
        for product, bias in (eq.args, eq.args[::-1]):
            made, view = flow.trace(product) if isinstance(product, Value) else (None, ())
            mm = flow.producer(made, aten.mm.default)
            if mm is None or not isinstance(bias, Value) or bias.dtype != made.dtype or bias.fake.dim() != 1:
                continue
            if made.shape[1:] != bias.shape or eq.outputs.shape != product.shape or _rows(view, made) is None:
                continue
            x, w = mm.args
            replacement = lambda env, x=x, w=w, bias=bias, view=view: [arrange(torch.addmm(env[bias], env[x], env[w]), view)]
            equations = flow.between([eq.outputs], {x, w, bias})
            yield Match(equations, [eq.outputs], replacement, f"{x.shape[0]} rows, {bias.shape[0]} columns", ("linear", view))
            break


def _rows(view: Dims, matrix: Value) -> tuple[Run, ...] | None:
    """The order in which a view shows the rows of a matrix, all of them and once, split over several dimensions perhaps, with the
    columns last; None if it shows it otherwise."""
    rows = tuple(run for dim in view[:-1] for run in dim)
    whole = view and view[-1] == natural(matrix.shape)[1] and all(run.axis == 0 for run in rows)
    return rows if whole and inverse(view, matrix.shape) is not None else None


def products_of_moved_rows(flow: Dataflow) -> Iterator[Match]:
    """Rows that are brought back, after a product, into an order in which they were before others were made of them: they stay
    in it. What comes next to the product can then be done to its tiles."""
    for eq in flow.graph.equations:
        if eq.op not in (aten.mm.default, aten.addmm.default) or eq.kwargs:
            continue
        *bias, x, w = eq.args
        out, view = flow.last_view(eq.outputs)
        rows = _rows(view, eq.outputs)
        if rows is None or rows == natural(eq.outputs.shape)[0] or any(v.fake.dim() != 1 for v in bias):
            continue
        order = rows, natural(x.shape)[1]
        _, came = flow.trace(x)
        stayed = compose(order, came, x.shape)
        if stayed is None or not _in_order(stayed[0]) or _in_order(came[0]):
            continue

        def replacement(env: dict[Value, torch.Tensor], x=x, w=w, bias=bias, order=order, shape=tuple(out.shape)) -> list[torch.Tensor]:
            given = arrange(env[x], order), env[w]
            return [(torch.addmm(env[bias[0]], *given) if bias else torch.mm(*given)).view(shape)]

        equations = flow.between([out], {*bias, x, w})
        yield Match(equations, [out], replacement, f"{x.shape[0]} rows", ("moved rows", order, tuple(out.shape)))


def _in_order(dim: tuple[Run, ...]) -> bool:
    axes = [run.axis for run in dim]
    return None not in axes and axes == sorted(axes)


def embedding_by_index(flow: Dataflow) -> Iterator[Match]:
    """weight[indices], rows of a matrix: its derivative adds rows, for which there is a kernel."""
    for eq in flow.graph.equations:
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
