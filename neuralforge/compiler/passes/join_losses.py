"""Losses and the gradient of their logits in one visit of each row, while it is in the cache.

That needs the cotangents of the losses first: those of a mean or a sum, masked or scaled, don't depend on the losses.
"""

from __future__ import annotations

import torch

from ...graph.ir import Equation, Graph
from ...graph.operators import has_effect
from .dataflow import Dataflow
from .rewrites import make, refuse

own = torch.ops.neuralforge
FORWARD, BACKWARD = own.cross_entropy.default, own.cross_entropy_backward.default


def join_losses(graph: Graph) -> Graph:
    """Replace neuralforge::cross_entropy and its backward by neuralforge::cross_entropy_with_gradient."""
    for eq in graph.equations:
        if eq.op is not FORWARD:
            continue
        flow = Dataflow(graph)
        backward = _backward(flow, eq)
        early = _early(flow, eq, backward) if backward is not None else None
        if backward is not None and early is None:
            refuse("join_losses", eq.source, "the cotangents of the losses depend on the losses")
        elif backward is not None and make("join_losses", eq.source, "{} rows of {}".format(*eq.args[0].shape)):
            graph = _replaced(graph, eq, backward, early)
    return graph


def _backward(flow: Dataflow, loss: Equation) -> Equation | None:
    """The one that reads what the losses do."""
    found = [eq for eq in flow.users.get(loss.outputs[1], ()) if eq.op is BACKWARD]
    if len(found) != 1:
        return None
    _, logits, target, _, _, ignore = _arguments(found[0])
    return found[0] if (logits, target, ignore) == (*loss.args, -100)[:3] else None


def _arguments(backward: Equation) -> tuple:
    return *backward.args, *(None, -100)[len(backward.args) - 4 :]


def _early(flow: Dataflow, loss: Equation, backward: Equation) -> list[Equation] | None:
    """The equations after the loss that the cotangents need; None if these need the loss."""
    grad, *_, grad_lse, _ = _arguments(backward)
    early, todo = set(), [grad] if grad_lse is None else [grad, grad_lse]
    while todo:
        eq = flow.producers.get(todo.pop())
        if eq is loss or eq is not None and has_effect(eq.op, eq.args, eq.kwargs):
            return None
        if eq is not None and eq not in early and flow.position[eq] > flow.position[loss]:
            early.add(eq)
            todo += eq.inputs
    return sorted(early, key=flow.position.__getitem__)


def _replaced(graph: Graph, loss: Equation, backward: Equation, early: list[Equation]) -> Graph:
    grad, logits, target, _, grad_lse, ignore = _arguments(backward)
    joint = Equation(
        own.cross_entropy_with_gradient.default, (grad, logits, target, grad_lse, ignore), {},
        (*loss.outputs, backward.outputs), loss.source, "join_losses",
    )  # fmt: skip
    equations = []
    for eq in graph.equations:
        if eq is loss:
            equations += [*early, joint]
        elif eq is not backward and eq not in early:
            equations.append(eq)
    return graph.replace(equations=equations)
