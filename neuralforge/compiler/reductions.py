"""Operators that fusion knows beyond the elementwise ones: sums of everything, of rows and of columns, and those that
normalise rows. A *row* is what lies in the trailing dimensions reduced over; rows are contiguous."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from ..graph.ir import Equation, Value
from .joined import Joined
from .pointwise import LETTERS, supported

aten = torch.ops.aten


@dataclass(frozen=True)
class Role:
    """How an equation takes part in a group."""

    over: Value
    """A value (argument or result) with the shape and layout of the elements it runs over."""
    results: tuple[str, ...] = ("full",)
    """Of each result: "full", an element each; "row", one for each row; "column", one for each place in a row, summed
    over the rows; "all", one."""
    columns: int | None = None
    """Length of a row; None if the operator needs none."""


MAX_COLUMN_SUMS = 16384
"""The longest row whose columns are summed here: partial sums of some blocks of rows must fit the cache."""

NORMALISING = {aten._softmax.default, aten._log_softmax.default}
NORMALISING_BACKWARD = {aten._softmax_backward_data.default, aten._log_softmax_backward_data.default}
SUMS = {aten.sum.dim_IntList, aten.mean.dim}
EXTREMA = {aten.amax.default, aten.amin.default}


def role(eq: Equation) -> Role | None:
    """None if the equation can't be a member of a fused group."""
    if isinstance(eq.op, Joined):
        return None
    if supported(eq):
        return Role(eq.outputs)
    if not eq.args or not isinstance(eq.args[0], Value) or not eq.results:
        return None
    x = eq.args[0]
    floating = all(LETTERS.get(v.dtype) in ("f", "d") and v.device.type == "cpu" for v in (*eq.inputs, *eq.results))
    if not floating or x.fake.dim() == 0 or x.fake.numel() == 0:
        return None
    if eq.op in (aten.sum.default, aten.mean.default) and not eq.kwargs:
        return Role(x, ("all",))
    if eq.op is aten.native_layer_norm.default:
        return Role(x, ("full", "row", "row"), math.prod(eq.args[1]))
    if eq.op is aten.native_layer_norm_backward.default:
        kinds = ("full", "column", "column")
        known = all(wanted == isinstance(v, Value) for wanted, v in zip(eq.args[7], eq.outputs))
        columns = math.prod(eq.args[2])
        return Role(x, tuple(k for k, w in zip(kinds, eq.args[7]) if w), columns) if known and eq.args[7][0] else None
    if not isinstance(eq.outputs, Value):
        return None
    if eq.op in NORMALISING and not eq.args[2] or eq.op in NORMALISING_BACKWARD and eq.args[3] == x.dtype:
        return over_rows(x, [eq.args[1 if eq.op in NORMALISING else 2]], "full")
    if eq.op is aten.logsumexp.default or eq.op in EXTREMA and x.dtype in (torch.float32, torch.float64):
        return over_rows(x, eq.args[1] if len(eq.args) > 1 else [], "row")
    if eq.op is aten.var.correction and not isinstance(eq.kwargs.get("correction"), float):
        return over_rows(x, eq.args[1] if len(eq.args) > 1 else None, "row")
    if eq.op in SUMS and not eq.kwargs:
        return over_rows(x, eq.args[1], "row") or _over_columns(x, eq.args[1])
    return None


def over_rows(x: Value, dims: list[int] | None, kind: str) -> Role | None:
    """The role of an operator over `dims` if they are the trailing ones, but not all."""
    wanted = {d % x.fake.dim() for d in dims or ()}
    trailing = range(x.fake.dim() - len(wanted), x.fake.dim())
    columns = math.prod(x.shape[d] for d in trailing)
    fits = wanted == set(trailing) and 1 < columns < x.fake.numel()
    return Role(x, (kind,), columns) if fits else None


def _over_columns(x: Value, dims: list[int] | None) -> Role | None:
    """The role of a sum over `dims` if they are the leading ones, but not all."""
    wanted = {d % x.fake.dim() for d in dims or ()}
    columns = math.prod(x.shape[len(wanted) :])
    fits = wanted and wanted == set(range(len(wanted))) and 1 < columns <= MAX_COLUMN_SUMS and columns < x.fake.numel()
    return Role(x, ("column",), columns) if fits else None
