"""Elementwise operators as C expressions on vectors: the table that fusion and code generation share.

An entry takes the equation's type letter (`f` float, `d` double, `l` int64, `b` bool) and its operands, already
converted to that type, and gives an expression. The functions named there are in `vector.h`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from ..graph.ir import Equation, Value

aten = torch.ops.aten

LETTERS = {torch.float32: "f", torch.float64: "d", torch.int64: "l", torch.bool: "b"}


def constant(t: str, value: Any) -> str:
    """A Python number on all lanes."""
    if t == "b":
        return "TRUE" if value else "FALSE"
    if t == "l":
        return f"SET_l({int(value)}L)"
    value = float(value)
    if math.isnan(value):
        return f"SET_{t}(__builtin_nan(\"\"))"
    if math.isinf(value):
        return f"SET_{t}({'-' if value < 0 else ''}__builtin_inf())"
    return f"SET_{t}({value!r})"


def _binary(symbol: str) -> Callable:
    return lambda t, eq, a, b: f"({a} {symbol} {b})"


def _scaled(symbol: str) -> Callable:
    def emit(t: str, eq: Equation, a: str, b: str) -> str:
        alpha = eq.kwargs.get("alpha", 1)
        return f"({a} {symbol} {b})" if alpha == 1 else f"({a} {symbol} {b} * {constant(t, alpha)})"

    return emit


def _call(name: str) -> Callable:
    return lambda t, eq, *operands: f"{name}_{t}({', '.join(operands)})"


def _power(t: str, eq: Equation, x: str) -> str:
    n = eq.args[1]
    powers = {0.5: f"sqrt_{t}({x})", -0.5: f"({constant(t, 1)} / sqrt_{t}({x}))", 1: x, 2: f"({x} * {x})",
              3: f"({x} * {x} * {x})", -1: f"({constant(t, 1)} / {x})", -2: f"({constant(t, 1)} / ({x} * {x}))"}  # fmt: skip
    return powers.get(n) or f"pow_{t}({x}, {constant(t, n)})"


def _gelu(name: str) -> Callable:
    def emit(t: str, eq: Equation, *operands: str) -> str:
        kind = "_tanh" if eq.kwargs.get("approximate", "none") == "tanh" else ""
        return f"{name}{kind}_{t}({', '.join(operands)})"

    return emit


FLOATING = {
    aten.add.Tensor: _scaled("+"), aten.add.Scalar: _scaled("+"), aten.sub.Tensor: _scaled("-"),
    aten.sub.Scalar: _scaled("-"), aten.rsub.Scalar: lambda t, eq, a, b: f"({b} - {a})",
    aten.mul.Tensor: _binary("*"), aten.mul.Scalar: _binary("*"),
    aten.div.Tensor: _binary("/"), aten.div.Scalar: _binary("/"),
    aten.neg.default: lambda t, eq, x: f"(-{x})",
    aten.reciprocal.default: lambda t, eq, x: f"({constant(t, 1)} / {x})",
    aten.square.default: lambda t, eq, x: f"({x} * {x})",
    aten.sqrt.default: _call("sqrt"), aten.rsqrt.default: lambda t, eq, x: f"({constant(t, 1)} / sqrt_{t}({x}))",
    aten.exp.default: _call("exp"), aten.log.default: _call("log"), aten.tanh.default: _call("tanh"),
    aten.erf.default: _call("erf"), aten.sigmoid.default: _call("sigmoid"), aten.sin.default: _call("sin"),
    aten.cos.default: _call("cos"), aten.abs.default: _call("abs"), aten.relu.default: _call("relu"),
    aten.gelu.default: _gelu("gelu"), aten.gelu_backward.default: _gelu("gelu_backward"),
    aten.silu.default: lambda t, eq, x: f"({x} * sigmoid_{t}({x}))", aten.silu_backward.default: _call("silu_backward"),
    aten.maximum.default: _call("maximum"), aten.minimum.default: _call("minimum"),
    aten.pow.Tensor_Scalar: _power, aten.pow.Scalar: _call("pow"), aten.pow.Tensor_Tensor: _call("pow"),
}  # fmt: skip
"""Operators on numbers of one type, the result's."""

COMPARISONS = {
    getattr(getattr(aten, name), overload): symbol
    for name, symbol in {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">="}.items()
    for overload in ("Tensor", "Scalar")
}
LOGIC = {aten.logical_and.default: "&", aten.logical_or.default: "|", aten.bitwise_and.Tensor: "&", aten.bitwise_or.Tensor: "|"}
INTEGER = {aten.add.Tensor, aten.add.Scalar, aten.sub.Tensor, aten.sub.Scalar, aten.mul.Tensor, aten.mul.Scalar}
MOVES = {aten._to_copy.default, aten.clone.default}
SELECTS = {aten.where.self, aten.masked_fill.Scalar}


def supported(eq: Equation) -> bool:
    """Can this equation be a member of a fused group?"""
    if hasattr(eq.op, "graph"):
        return False
    values = [*eq.inputs, *eq.results]
    if any(v.dtype not in LETTERS or v.device.type != "cpu" for v in values) or not isinstance(eq.outputs, Value):
        return False
    y = eq.outputs
    if eq.op is aten.sum.default:
        x = eq.args[0]
        return not eq.kwargs and x.dtype in (torch.float32, torch.float64) and x.fake.dim() > 0 and _dense(x)
    if not _dense(y):
        return False
    letter = LETTERS[y.dtype]
    if eq.op is aten.full.default:
        return isinstance(eq.args[1], (int, float, bool)) and y.fake.dim() > 0
    if not eq.inputs:
        return False
    if eq.op in FLOATING:
        if eq.op is aten.pow.Scalar and letter != "d":
            return False
        return letter in "fd" or letter == "l" and eq.op in INTEGER and all(v.dtype == torch.int64 for v in values)
    if eq.op in COMPARISONS or eq.op in LOGIC:
        return True
    if eq.op is aten.logical_not.default:
        return eq.args[0].dtype == torch.bool
    if eq.op in MOVES:
        return set(eq.kwargs) <= {"dtype", "memory_format"}
    return eq.op in SELECTS and letter in "fdl"


def expression(eq: Equation, operand: Callable[[Any, str], str]) -> str:
    """The equation as C; `operand(x, letter)` is a value or Python number converted to a type."""
    op, t = eq.op, LETTERS[eq.outputs.dtype]
    if op in FLOATING:
        arguments = eq.args[:1] if op is aten.pow.Tensor_Scalar else eq.args
        if op in (aten.rsub.Scalar, aten.add.Scalar, aten.sub.Scalar, aten.gelu.default):
            arguments = eq.args[:2]
        return FLOATING[op](t, eq, *(operand(a, t) for a in arguments))
    if op in COMPARISONS:
        wide = common_letter(eq.args)
        return f"(MASK_{wide}({operand(eq.args[0], wide)} {COMPARISONS[op]} {operand(eq.args[1], wide)}))"
    if op in LOGIC:
        return f"({operand(eq.args[0], 'b')} {LOGIC[op]} {operand(eq.args[1], 'b')})"
    if op is aten.logical_not.default:
        return f"(~{operand(eq.args[0], 'b')})"
    if op in MOVES:
        return operand(eq.args[0], t)
    if op is aten.full.default:
        return constant(t, eq.args[1])
    mask, a, b = eq.args if op is aten.where.self else (eq.args[1], eq.args[2], eq.args[0])
    return f"SELECT_{t}({operand(mask, 'b')}, {operand(a, t)}, {operand(b, t)})"


def common_letter(args: tuple) -> str:
    """The type in which two operands are compared."""
    fakes = [a.fake if isinstance(a, Value) else a for a in args[:2]]
    return LETTERS.get(torch.result_type(*fakes), "d")


def _dense(v: Value) -> bool:
    """Every element of one block of memory, once, in some order of the dimensions."""
    expected = 1
    for stride, size in sorted((s, n) for s, n in zip(v.strides, v.shape) if n != 1):
        if stride != expected:
            return False
        expected *= size
    return v.fake.numel() > 0
