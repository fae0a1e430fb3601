"""The loss head: a linear layer whose outputs only a cross entropy reads, rows of logits at a time.

The gradients are made together with the losses, so that nothing is computed twice: where `join_losses` found the gradient
of the logits to need no losses, or nobody reads it. Else the head is left alone.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from ...graph.builder import Builder
from ...graph.ir import Equation, Graph, Value
from ...kernels import linear_cross_entropy as kernel
from .dataflow import Dataflow
from .narrow import converts
from .rewrites import make, refuse

aten, own = torch.ops.aten, torch.ops.neuralforge
LOSSES, TOGETHER = own.cross_entropy.default, own.cross_entropy_with_gradient.default
SMALL = {torch.float32: 1 << 25, torch.bfloat16: 1 << 28}
"""Bytes of logits below which they stay in memory: products of few rows take longer, above all where products are fast. Logits of
other types always do."""


def chunk_loss_heads(graph: Graph) -> Graph:
    """Replace loss heads by neuralforge::linear_cross_entropy, or its form with gradients."""
    for eq in graph.equations:
        if eq.op in (LOSSES, TOGETHER):
            flow = Dataflow(graph)
            head = _find(flow, eq)
            if head is not None and make("chunk_loss_heads", eq.source, head.reason):
                graph = _replaced(graph, head)
    return graph


@dataclass
class _Head:
    product: Equation
    loss: Equation
    gradient: Value | None
    """Of the logits."""
    dx: list[Equation]
    dw: list[tuple[Equation, bool]]
    """With whether it is the transpose of the weight's gradient."""
    db: list[Equation]
    views: list[Equation]
    """Of the logits' gradient."""
    wide: list[Equation]
    """The conversions of the weight's gradients to float32, where nothing else reads them."""
    reason: str

    @property
    def gone(self) -> set[Equation]:
        return {self.product, self.loss, *self.views, *self.dx, *self.db, *(eq for eq, _ in self.dw), *self.wide}


def _find(flow: Dataflow, loss: Equation) -> _Head | None:
    logits, gradient = (loss.args[0], None) if loss.op is LOSSES else (loss.args[1], loss.outputs[2])
    product = flow.producers.get(logits)
    if product is None or product.op not in (aten.mm.default, aten.addmm.default) or product.kwargs:
        return None
    x, wt = product.args[-2:]
    bias = product.args[0] if product.op is aten.addmm.default else None
    rows, classes = logits.shape
    at_once = kernel.rows_at_once(rows, classes, logits.dtype)
    if logits.nbytes < SMALL.get(logits.dtype, math.inf) or at_once == rows or logits in flow.results:
        return None
    if loss.op is TOGETHER and loss.args[3] is not None or bias is not None and tuple(bias.shape) != (logits.shape[1],):
        return None
    readers = [eq.name for eq in flow.users[logits] if eq is not loss]
    if readers:
        refuse("chunk_loss_heads", loss.source, f"the logits are also read by {', '.join(readers)}")
        return None
    reason = f"{rows} rows of {classes}, {at_once} at a time" + (", with gradients" if gradient else "")
    head = _Head(product, loss, gradient, [], [], [], [], [], reason)
    if gradient is not None and not _readers(flow, head, gradient, gradient, x, wt):
        refuse("chunk_loss_heads", loss.source, "the gradient of the logits is read by others than the linear layer's")
        return None
    narrow = [eq.outputs for eq, _ in head.dw if eq.outputs.dtype != torch.float32]
    readers = [reader for v in narrow for reader in flow.users.get(v, ())]
    if not flow.results & set(narrow) and all(converts(eq, torch.float32) for eq in readers):
        head.wide = readers
    # Gradients of weights in bfloat16 are summed up in float32.
    with x.fake.fake_mode:
        needed = kernel.in_place_of_logits(x.fake, wt.fake.t(), gradient is None or bool(head.wide))
    if needed > 0.75 * logits.nbytes:
        refuse("chunk_loss_heads", loss.source, f"it would need {needed} bytes in place of the logits' {logits.nbytes}")
        return None
    return head


def _readers(flow: Dataflow, head: _Head, v: Value, g: Value, x: Value, wt: Value) -> bool:
    """Sort the readers of `v`, the logits' gradient `g` or its transpose; False if one is none of the linear layer's."""
    if v in flow.results:
        return False
    whole = flow.trace(g)[1]
    straight = lambda a, b: flow.trace(a) == flow.trace(b)
    turned = lambda a, b: (lambda p, q: p[0] is q[0] and tuple(p[1]) == tuple(q[1])[::-1])(flow.trace(a), flow.trace(b))
    for eq in flow.users.get(v, ()):
        if eq.op is aten.mm.default and eq.args[0] is v and straight(v, g) and turned(eq.args[1], wt):
            head.dx.append(eq)
        elif eq.op is aten.mm.default and eq.args[0] is v and turned(v, g) and straight(eq.args[1], x):
            head.dw.append((eq, False))
        elif eq.op is aten.mm.default and eq.args[1] is v and straight(v, g) and turned(eq.args[0], x):
            head.dw.append((eq, True))
        elif eq.op is aten.sum.dim_IntList and straight(v, g) and _of_rows(eq, head):
            head.db.append(eq)
        elif flow.trace(eq.results[0])[0] is flow.trace(g)[0] and tuple(flow.trace(eq.results[0])[1]) in (
            tuple(whole), tuple(whole)[::-1],
        ):  # fmt: skip
            head.views.append(eq)
            if not _readers(flow, head, eq.outputs, g, x, wt):
                return False
        else:
            return False
    return True


def _of_rows(eq: Equation, head: _Head) -> bool:
    """The gradient of the bias?"""
    return head.product.op is aten.addmm.default and list(eq.args[1]) in ([0], [-2]) and not eq.kwargs


def _replaced(graph: Graph, head: _Head) -> Graph:
    builder, gone = Builder(graph), head.gone
    x, wt = head.product.args[-2:]
    bias = head.product.args[0] if head.product.op is aten.addmm.default else None
    made = {"source": head.loss.source, "origin": "chunk_loss_heads"}
    env: dict[Value, Value] = {}
    for eq in graph.equations:
        if eq is not head.loss:
            if eq not in gone:
                builder.equations.append(eq)
            continue
        weight = builder.emit(aten.t.default, wt, **made)
        if head.gradient is None:
            _, target, ignore = (*eq.args, -100)[:3]
            found = builder.emit(own.linear_cross_entropy.default, x, weight, target, bias, ignore, **made)
        else:
            grad, _, target, _, ignore = eq.args
            op = own.linear_cross_entropy_with_gradients.default
            *found, dx, dw, db = builder.emit(op, grad, x, weight, target, bias, ignore, bool(head.wide), **made)
        env.update(zip(eq.results, found))
        for old in head.dx:
            env[old.outputs] = dx
        for old, turned in head.dw:
            new = builder.emit(aten.t.default, dw, **made) if turned else dw
            if new.strides != old.outputs.strides:
                new = builder.emit(aten.clone.default, new, memory_format=torch.contiguous_format, **made)
            env[old.outputs] = new
            env.update((eq.outputs, new) for eq in head.wide if eq.args[0] is old.outputs)
        for old in head.db:
            env[old.outputs] = builder.emit(aten.view.default, db, list(old.outputs.shape), **made)
    equations = [eq.reading(env) for eq in builder.equations]
    return graph.replace(equations=equations, outputs=[env.get(v, v) if isinstance(v, Value) else v for v in graph.outputs])
