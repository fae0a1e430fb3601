"""The functional collectives of torch.distributed, all linear: the adjoint of each is another one, in which all ranks take part. A rank's
loss is its own; the sum of all ranks' is differentiated, as by torch.autograd."""

from __future__ import annotations

import torch

from ...errors import DifferentiationError
from ...graph.source import user_line
from .table import Rule, linear, rule, rules

c10d = torch.ops._c10d_functional


@rule("_c10d_functional::wait_tensor")
def wait_tensor(y, x):
    return linear(lambda g: g)


# Outside of captures in place of the above; registered when torch.distributed._functional_collectives is imported.
rules["_c10d_functional::_wrap_tensor_autograd"] = Rule(wait_tensor, True)


@rule("_c10d_functional::all_reduce")
def all_reduce(y, x, op, group):
    _check(op)
    return linear(lambda g: c10d.wait_tensor(c10d.all_reduce(g.contiguous(), op, group)))


@rule("_c10d_functional::all_gather_into_tensor")
def all_gather(y, x, size, group):
    return linear(lambda g: c10d.wait_tensor(c10d.reduce_scatter_tensor(g.contiguous(), "sum", size, group)))


@rule("_c10d_functional::reduce_scatter_tensor")
def reduce_scatter(y, x, op, size, group):
    _check(op)
    share = size if op == "avg" else 1
    return linear(lambda g: c10d.wait_tensor(c10d.all_gather_into_tensor(g.contiguous(), size, group)) / share)


@rule("_c10d_functional::all_to_all_single")
def all_to_all(y, x, received, sent, group):
    return linear(lambda g: c10d.wait_tensor(c10d.all_to_all_single(g.contiguous(), sent, received, group)))


@rule("_c10d_functional::broadcast")
def broadcast(y, x, source, group):
    mine = torch._C._distributed_c10d._resolve_process_group(group).rank() == source
    total = lambda g: c10d.wait_tensor(c10d.all_reduce(g.contiguous(), "sum", group))
    return linear(lambda g: total(g) if mine else torch.zeros_like(total(g)))


@rule("_c10d_functional::all_reduce_coalesced")
def all_reduce_coalesced(ys, xs, op, group):
    _check(op)
    return linear(lambda gs: [*map(c10d.wait_tensor, c10d.all_reduce_coalesced(_all(gs, ys), op, group))])


@rule("_c10d_functional::all_gather_into_tensor_coalesced")
def all_gather_coalesced(ys, xs, size, group):
    return linear(lambda gs: [*map(c10d.wait_tensor, c10d.reduce_scatter_tensor_coalesced(_all(gs, ys), "sum", size, group))])


@rule("_c10d_functional::reduce_scatter_tensor_coalesced")
def reduce_scatter_coalesced(ys, xs, op, size, group):
    _check(op)
    share = size if op == "avg" else 1
    return linear(lambda gs: [c10d.wait_tensor(g) / share for g in c10d.all_gather_into_tensor_coalesced(_all(gs, ys), size, group)])


def _all(gs, ys):
    """The ranks exchange all parts, also those that nobody here has used."""
    return [torch.zeros_like(y) if g is None else g.contiguous() for g, y in zip(gs, ys)]


def _check(op):
    if op not in ("sum", "avg"):
        raise DifferentiationError(
            f"{user_line()}: a collective that reduces by {op!r} has no derivative rule; expected 'sum' or 'avg'. Take the {op} of what "
            f"torch.distributed._functional_collectives.all_gather_tensor gives, or wrap it in nf.stop_gradient."
        )
