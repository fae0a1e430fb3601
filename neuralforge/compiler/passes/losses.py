"""Cross entropies: one kernel for the rows of the logits, whatever is made of the rows' losses afterwards."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from ...graph.ir import Equation, Value
from ...kernels import cross_entropy as kernel
from .dataflow import Dataflow
from .patterns import Match
from .views import Dims, arrange, compose, inverse, natural, regroup, reshaped, size

aten = torch.ops.aten
NONE, MEAN, SUM = range(3)
INDICES, ONE_HOT = "by indices", "by a one-hot"
NOWHERE = -100
"""The target that the kernel ignores."""
Tensors = dict[Value, torch.Tensor]


def negative_log_likelihood(flow: Dataflow) -> Iterator[Match]:
    """nll_loss of log_softmax, as F.cross_entropy has it, with label smoothing too, which sums the rows."""
    for eq in flow.graph.equations:
        if eq.op not in (aten.nll_loss_forward.default, aten.nll_loss2d_forward.default):
            continue
        log_p, target, weight, reduction, ignore = eq.args
        softmax, view = _log_softmax(flow, log_p, 1)
        if softmax is None or weight is not None or log_p.fake.dim() < 2:
            continue
        rows = _Rows.of(flow, softmax.args[0], softmax, view, 1)
        if rows is None:
            continue
        sums = [user.outputs for user in flow.users[softmax.outputs] if _sums_classes(user, softmax)]
        sums = [v for v in sums if tuple(v.shape) == rows.shape][:1]
        if sums and rows.dims != natural(rows.root.shape):
            continue
        loss, total = eq.outputs

        def replacement(env: Tensors, rows=rows, target=target, reduction=reduction, ignore=ignore, sums=sums) -> list:
            losses, lse = rows.losses(env, env[target], ignore)
            count = (env[target] != ignore).sum().to(losses.dtype)
            if reduction != NONE:
                losses = losses.sum() / count if reduction == MEAN else losses.sum()
            smooth = [env[rows.root].sum(1, dtype=lse.dtype) - rows.classes * lse] if sums else []
            return [x.to(rows.root.dtype) for x in (losses, *smooth, count)]

        outputs = [loss, *sums, total]
        reason = f"{rows.reason}, {('of each row', 'mean', 'sum')[reduction]}" + (", with sums of rows" if sums else "")
        equations = flow.between(outputs, {rows.root, target})
        key = ("nll", reduction, ignore, rows.key, bool(sums))
        yield Match(equations, outputs, replacement, reason, key, len(outputs) - 1)


def _sums_classes(eq: Equation, softmax: Equation) -> bool:
    if eq.op is not aten.sum.dim_IntList or eq.kwargs:
        return False
    ndim = softmax.outputs.fake.dim()
    return [d % ndim for d in eq.args[1]] == [softmax.args[1] % ndim]


def _log_softmax(flow: Dataflow, v: Value, dim: int) -> tuple[Equation | None, Dims]:
    """The log-softmax over `dim` of which `v` is a view, and which view."""
    source, view = flow.trace(v)
    softmax = flow.producer(source, aten._log_softmax.default)
    if softmax is None or softmax.args[2] or v.fake.dim() < 2:
        return None, view
    return (softmax if view[dim] == natural(source.shape)[softmax.args[1] % source.fake.dim()] else None), view


def picked_log_softmax(flow: Dataflow) -> Iterator[Match]:
    """The log-softmax at the target: by gather, by indexing with arange, or by multiplying with a one-hot and summing."""
    for eq in flow.graph.equations:
        pick = _picked(flow, eq)
        if pick is None:
            continue
        softmax, view = _log_softmax(flow, pick.source, pick.dim)
        rows = _Rows.of(flow, softmax.args[0], softmax, view, pick.dim) if softmax is not None else None
        if rows is None:
            continue

        def replacement(env: Tensors, rows=rows, pick=pick, out=eq.outputs) -> list:
            losses = -rows.losses(env, pick.index(env))[0]
            return [pick.result(losses).view(out.shape).to(out.dtype)]

        equations = flow.between([eq.outputs], {rows.root, pick.target})
        yield Match(equations, [eq.outputs], replacement, f"{rows.reason}, {pick.how}", (pick.key, rows.key))


def picked_logits(flow: Dataflow) -> Iterator[Match]:
    """logsumexp(x) less x at the target; the logsumexp may be read by others too (z-loss)."""
    for eq in flow.graph.equations:
        if eq.op is not aten.sub.Tensor or eq.kwargs or not all(isinstance(x, Value) for x in eq.args):
            continue
        total, found = (flow.producers.get(_in_order(flow, v, eq.outputs)) for v in eq.args)
        pick = _picked(flow, found) if total is not None and total.op is aten.logsumexp.default and found is not None else None
        if pick is None or flow.same(pick.source) is not flow.same(total.args[0]):
            continue
        x = total.args[0]
        if not x.shape or [d % x.fake.dim() for d in total.args[1]] != [pick.dim]:
            continue
        rows = _Rows.of(flow, x, None, natural(x.shape), pick.dim)
        if rows is None:
            continue
        outputs = [eq.outputs, total.outputs]

        def replacement(env: Tensors, rows=rows, pick=pick, shape=eq.outputs.shape, of_total=total.outputs.shape) -> list:
            at = pick.index(env)
            losses, lse = rows.losses(env, at)
            losses = torch.where(at == NOWHERE, lse, losses) if pick.how == ONE_HOT else losses  # less nothing
            return [losses.view(shape).to(rows.root.dtype), lse.view(of_total).to(rows.root.dtype)]

        equations = flow.between(outputs, {rows.root, pick.target})
        yield Match(equations, outputs, replacement, f"{rows.reason}, {pick.how}", ("logits", pick.key, rows.key))


def _in_order(flow: Dataflow, v: Value, like: Value) -> Value | None:
    """What `v`, with as many numbers as `like`, shows all of, in its order: a transpose would pair other rows."""
    root, view = flow.trace(v)
    return root if v.fake.numel() == like.fake.numel() and reshaped(view, root.shape, v.shape) else None


@dataclass
class _Pick:
    """One element of each row: `source` along `dim` at `target`."""

    source: Value
    dim: int
    target: Value
    how: str
    summed: bool = False

    @property
    def key(self) -> tuple:
        return self.how, self.dim, self.summed

    def index(self, env: Tensors) -> torch.Tensor:
        """The target for each row, in the source's order of dimensions; NOWHERE where a one-hot is all zeros."""
        shape = [n for d, n in enumerate(self.source.shape) if d != self.dim]
        target, classes = env[self.target], self.source.shape[self.dim]
        target = target.reshape(shape) if target.numel() == torch.Size(shape).numel() else target.expand(shape)
        if self.how == INDICES:
            return torch.where(target < 0, target + classes, target)  # counted from the end, if negative
        return torch.where((target >= 0) & (target < classes), target, NOWHERE) if self.how == ONE_HOT else target

    def result(self, picked: torch.Tensor) -> torch.Tensor:
        return picked.sum() if self.summed else picked


def _picked(flow: Dataflow, eq: Equation) -> _Pick | None:
    if eq.op is aten.gather.default and not any(eq.kwargs.values()):
        x, dim, index = eq.args
        dim %= max(x.fake.dim(), 1)
        wanted = tuple(1 if d == dim else n for d, n in enumerate(x.shape))
        return _Pick(x, dim, index, "by gather") if tuple(index.shape) == wanted else None
    if eq.op is aten.index.Tensor and isinstance(eq.args[0], Value):
        x, indices = eq.args
        ndim = x.fake.dim()
        if len(indices) != ndim or ndim < 2 or None in indices or indices[-1].dtype != torch.int64:
            return None
        grid = tuple(x.shape[:-1])
        if tuple(eq.outputs.shape) != grid:
            return None
        for d, index in enumerate(indices[:-1]):
            known = flow.literal(index)
            count = torch.arange(grid[d]).view([-1 if i == d else 1 for i in range(ndim - 1)])
            if known is None or known.dim() > ndim - 1 or not torch.equal(known.expand(grid), count.expand(grid)):
                return None
        return _Pick(x, ndim - 1, indices[-1], INDICES)
    if eq.op in (aten.sum.dim_IntList, aten.sum.default) and not eq.kwargs:
        product = flow.producer(eq.args[0], aten.mul.Tensor)
        for x, hot in (product.args, product.args[::-1]) if product is not None else ():
            target = _one_hot(flow, hot)
            if target is None or not isinstance(x, Value) or x.shape != hot.shape or not x.shape:
                continue
            last = x.fake.dim() - 1
            everything = eq.op is aten.sum.default
            if everything or [d % (last + 1) for d in eq.args[1]] == [last]:
                return _Pick(x, last, target, ONE_HOT, everything)
    return None


def _one_hot(flow: Dataflow, v: object) -> Value | None:
    """The indices of which `v` is the one-hot, along the last dimension."""
    while (eq := flow.producer(v, aten._to_copy)) is not None:
        v = eq.args[0]
    eq = flow.producer(v, aten.eq.Tensor)
    if eq is None:
        return None
    target, classes = eq.args
    known = flow.literal(classes)
    lined_up = isinstance(target, Value) and target.shape and target.fake.dim() == v.fake.dim() and target.shape[-1] == 1
    if not lined_up or known is None or not torch.equal(known.reshape(-1), torch.arange(v.shape[-1])):
        return None
    return target if target.shape[:-1] == v.shape[:-1] and target.dtype == torch.int64 else None


@dataclass
class _Rows:
    """Logits as rows: `root`, a tensor of which they are a view, is read as [N, V] with its rows in any order."""

    root: Value
    dims: Dims
    """Of [N, V], in the root."""
    order: Dims
    """Of the rows, [N], in the logits without their classes."""
    back: Dims
    shape: tuple[int, ...]
    """Of the logits without their classes."""
    classes: int
    key: tuple

    @classmethod
    def of(cls, flow: Dataflow, x: Value, reader: Equation | None, view: Dims, axis: int) -> _Rows | None:
        """Of the logits `x`, read by `reader` (None: by several) through `view`, where their classes are along `axis`."""
        root, dims = flow.root(x, reader) if reader is not None else (x, natural(x.shape))
        shape = tuple(map(size, view))
        dims = compose(view, dims, x.shape)
        if dims is None or any(run.axis is None for dim in dims for run in dim):
            return None
        runs = [run for d, dim in enumerate(dims) if d != axis for run in dim]
        outer = tuple(n for d, n in enumerate(shape) if d != axis)
        split = regroup(natural(outer), tuple(run.size for run in runs))
        by_place = sorted(range(len(runs)), key=lambda i: (runs[i].axis, -runs[i].step))
        order = (tuple(run for i in by_place for run in split[i]),)
        back = inverse(order, outer)
        rows = (tuple(runs[i] for i in by_place), dims[axis])
        with x.fake.fake_mode:
            matrix = x.fake.new_empty(size(rows[0]), size(rows[1]))
        if back is None or not kernel.native(matrix):
            return None
        return cls(root, rows, order, back, outer, matrix.shape[1], (rows, order, axis))

    @property
    def reason(self) -> str:
        return f"{size(self.dims[0])} rows of {self.classes}"

    def losses(self, env: Tensors, target: torch.Tensor, ignore_index: int = NOWHERE) -> tuple[torch.Tensor, torch.Tensor]:
        """Loss and log-sum-exp of each row, in the shape of the logits without their classes; at least float32."""
        matrix = arrange(env[self.root], self.dims).contiguous()
        index = arrange(target.reshape(self.shape), self.order)
        return tuple(map(self.result, kernel.cross_entropy(matrix, index, ignore_index)))

    def result(self, rows: torch.Tensor) -> torch.Tensor:
        return arrange(rows, self.back)
