"""The loss head: log-softmax and negative log-likelihood, with their backward pass, as one kernel each way."""

from __future__ import annotations

import torch

from ...graph.builder import Builder
from ...graph.ir import Equation, Graph, Value, leaves, substitute
from ...kernels import cross_entropy as kernel

aten = torch.ops.aten
MEAN = 1


def claim_cross_entropy(graph: Graph) -> Graph:
    """Mean cross entropy over the rows of a float32 matrix, found by its operators:

        p = _log_softmax(x, 1);  loss, n = nll_loss_forward(p, target);
        dx = _log_softmax_backward_data(nll_loss_backward(g, p, target, n), p, 1)

    becomes `neuralforge.cross_entropy` and, if there is a backward pass, `neuralforge.cross_entropy_backward`. The
    log-probabilities and their gradient, each as large as the logits, never exist.
    """
    users = graph.users()
    outputs = set(leaves(graph.outputs))
    heads = [head for eq in graph.equations if (head := _match(eq, users, outputs)) is not None]
    if not heads:
        return graph
    start = {head.softmax: head for head in heads}
    end = {head.softmax_backward: head for head in heads if head.softmax_backward is not None}
    dropped = {eq for head in heads for eq in head.equations}
    builder = Builder(graph)
    env: dict[Value, Value] = {}
    for eq in graph.equations:
        if eq in start:
            head = start[eq]
            made = {"source": head.nll.source, "origin": "claim_cross_entropy"}
            head.values = builder.emit(
                torch.ops.neuralforge.cross_entropy.default, *substitute((head.logits, head.target, head.ignore), env), **made
            )
            loss, _, count = head.values
            env.update(zip(head.nll.outputs, (loss, count)))
        elif eq in end:
            head = end[eq]
            _, lse, count = head.values
            arguments = (head.nll_backward.args[0], head.logits, head.target, lse, count, head.ignore)
            made = {"source": eq.source, "origin": "claim_cross_entropy"}
            op = torch.ops.neuralforge.cross_entropy_backward.default
            env[eq.outputs] = builder.emit(op, *substitute(arguments, env), **made)
        elif eq not in dropped:
            builder.equations.append(
                Equation(eq.op, substitute(eq.args, env), substitute(eq.kwargs, env), eq.outputs, eq.source, eq.origin)
            )
    return graph.replace(equations=builder.equations, outputs=substitute(graph.outputs, env))


class _Head:
    """The equations of one cross entropy."""

    def __init__(self, softmax: Equation, nll: Equation):
        self.softmax, self.nll = softmax, nll
        self.nll_backward: Equation | None = None
        self.softmax_backward: Equation | None = None
        self.logits, self.target, self.ignore = softmax.args[0], nll.args[1], nll.args[4]

    @property
    def equations(self) -> list[Equation]:
        return [eq for eq in (self.softmax, self.nll, self.nll_backward, self.softmax_backward) if eq is not None]


def _match(eq: Equation, users: dict[Value, list[Equation]], outputs: set[Value]) -> _Head | None:
    if eq.op is not aten._log_softmax.default:
        return None
    x = eq.args[0]
    rows = x.fake.dim() == 2 and eq.args[1] in (1, -1) and x.fake.is_contiguous() and x.fake.numel() > 0
    if not rows or x.dtype != torch.float32 or x.device.type != "cpu" or not kernel.available():
        return None
    by_op: dict[object, list[Equation]] = {}
    for user in users.get(eq.outputs, []):
        by_op.setdefault(user.op, []).append(user)
    forwards = by_op.pop(aten.nll_loss_forward.default, [])
    backwards = by_op.pop(aten.nll_loss_backward.default, [])
    lasts = by_op.pop(aten._log_softmax_backward_data.default, [])
    if by_op or len(forwards) != 1 or len(backwards) != len(lasts) or len(lasts) > 1 or eq.outputs in outputs:
        return None
    head = _Head(eq, forwards[0])
    target, weight, reduction = head.nll.args[1:4]
    if weight is not None or reduction != MEAN or target.dtype != torch.int64 or target.fake.dim() != 1:
        return None
    if lasts:
        backward, last = backwards[0], lasts[0]
        chained = last.args[0] is backward.outputs and users[backward.outputs] == [last]
        same = backward.args[2:6] == (target, None, MEAN, head.ignore) and last.args[1] is eq.outputs
        if not chained or not same or backward.outputs in outputs or last.outputs.dtype != torch.float32:
            return None
        head.nll_backward, head.softmax_backward = backward, last
    return head
