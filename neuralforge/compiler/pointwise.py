"""Elementwise operators as C expressions on vectors: the table that fusion and code generation share.

An entry takes the equation's type letter (`f` float, `d` double, `l` int64, `b` bool) and its operands, already
converted to that type, and gives an expression. The functions named there are in `vector.h` and `vector_math.h`.
Half-width floats are computed with as float, and rounded when they are stored, compared or asked for by a conversion.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from ..graph.ir import Equation, Value
from .space import out_of_order

aten = torch.ops.aten

LETTERS = {
    torch.float32: "f", torch.float64: "d", torch.int64: "l", torch.bool: "b", torch.bfloat16: "f", torch.float16: "f",
}  # fmt: skip
"""The type computed with."""
STORED = {
    torch.float32: ("f", "float"), torch.float64: ("d", "double"), torch.int64: ("l", "long"),
    torch.bool: ("b", "unsigned char"), torch.bfloat16: ("bf", "unsigned short"), torch.float16: ("h", "unsigned short"),
}  # fmt: skip
"""The suffix of the load and store functions, and the C type of an element."""


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
        alpha = eq.args[2] if len(eq.args) > 2 else eq.kwargs.get("alpha", 1)
        return f"({a} {symbol} {b})" if alpha == 1 else f"({a} {symbol} {b} * {constant(t, alpha)})"

    return emit


def _call(name: str) -> Callable:
    return lambda t, eq, *operands: f"{name}_{t}({', '.join(operands)})"


def _one_over(name: str) -> Callable:
    return lambda t, eq, x: f"({constant(t, 1)} / {name.format(t=t, x=x)})"


def _power(t: str, eq: Equation, x: str) -> str:
    n = eq.args[1]
    powers = {0.5: f"sqrt_{t}({x})", -0.5: f"({constant(t, 1)} / sqrt_{t}({x}))", 1: x, 2: f"({x} * {x})",
              3: f"({x} * {x} * {x})", 4: f"(({x} * {x}) * ({x} * {x}))", -1: f"({constant(t, 1)} / {x})", -2: f"({constant(t, 1)} / ({x} * {x}))"}  # fmt: skip
    return powers.get(n) or f"pow_{t}({x}, {constant(t, n)})"


def _gelu(name: str) -> Callable:
    def emit(t: str, eq: Equation, *operands: str) -> str:
        kind = "_tanh" if eq.kwargs.get("approximate", "none") == "tanh" else ""
        return f"{name}{kind}_{t}({', '.join(operands)})"

    return emit


def _argument(eq: Equation, position: int, name: str, default: Any) -> Any:
    return eq.args[position] if len(eq.args) > position else eq.kwargs.get(name, default)


def _clamp(t: str, eq: Equation, x: str) -> str:
    low, high = _argument(eq, 1, "min", None), _argument(eq, 2, "max", None)
    x = x if low is None else _bounded("maximum", t, x, low)
    return x if high is None else _bounded("minimum", t, x, high)


def _bounded(name: str, t: str, x: str, bound: Any) -> str:
    """The operand last is the one that is taken where both are zeros, whatever their signs: so PyTorch's clamp does."""
    return f"{name}_{t}({constant(t, bound)}, {x})"


def _with_constants(name: str, *parameters: tuple[int, str, float]) -> Callable:
    """A function whose further parameters are Python numbers."""
    return lambda t, eq, *operands: (
        f"{name}_{t}({', '.join([*operands, *(constant(t, _argument(eq, *p)) for p in parameters)])})"
    )


def _add_product(symbol: str) -> Callable:
    def emit(t: str, eq: Equation, x: str, a: str, b: str) -> str:
        value = _argument(eq, 3, "value", 1)
        a = a if value == 1 else f"({constant(t, value)} * {a})"  # first, as in PyTorch: the product may be out of range
        return f"({x} + {a} {symbol} {b})"

    return emit


FLOATING = {
    aten.add.Tensor: _scaled("+"), aten.add.Scalar: _scaled("+"), aten.sub.Tensor: _scaled("-"),
    aten.sub.Scalar: _scaled("-"), aten.rsub.Scalar: lambda t, eq, a, b: _scaled("-")(t, eq, b, a),
    aten.rsub.Tensor: lambda t, eq, a, b: _scaled("-")(t, eq, b, a),
    aten.mul.Tensor: _binary("*"), aten.mul.Scalar: _binary("*"),
    aten.div.Tensor: _binary("/"), aten.div.Scalar: _binary("/"),
    aten.neg.default: lambda t, eq, x: f"(-{x})",
    aten.reciprocal.default: _one_over("{x}"), aten.rsqrt.default: _one_over("sqrt_{t}({x})"),
    aten.square.default: lambda t, eq, x: f"({x} * {x})",
    aten.sqrt.default: _call("sqrt"), aten.exp.default: _call("exp"), aten.expm1.default: _call("expm1"),
    aten.exp2.default: _call("exp2"), aten.log.default: _call("log"), aten.log1p.default: _call("log1p"),
    aten.log2.default: _call("log2"), aten.tanh.default: _call("tanh"),
    aten.erf.default: _call("erf"), aten.sigmoid.default: _call("sigmoid"), aten.sin.default: _call("sin"),
    aten.cos.default: _call("cos"), aten.abs.default: _call("abs"), aten.relu.default: _call("relu"),
    aten.sign.default: _call("sign"), aten.sgn.default: _call("sign"), aten.floor.default: _call("floor"),
    aten.ceil.default: _call("ceil"), aten.trunc.default: _call("trunc"), aten.round.default: _call("round"),
    aten.gelu.default: _gelu("gelu"), aten.gelu_backward.default: _gelu("gelu_backward"),
    aten.silu.default: lambda t, eq, x: f"({x} * sigmoid_{t}({x}))", aten.silu_backward.default: _call("silu_backward"),
    aten.tanh_backward.default: _call("tanh_backward"), aten.sigmoid_backward.default: _call("sigmoid_backward"),
    aten.threshold_backward.default: _with_constants("threshold_backward", (2, "threshold", 0)),
    aten.leaky_relu.default: _with_constants("leaky_relu", (1, "negative_slope", 0.01)),
    aten.softplus.default: _with_constants("softplus", (1, "beta", 1), (2, "threshold", 20)),
    aten.hardtanh.default: _with_constants("clamp", (1, "min_val", -1), (2, "max_val", 1)),
    aten.clamp.default: _clamp, aten.clamp_min.default: lambda t, eq, x: _bounded("maximum", t, x, eq.args[1]),
    aten.clamp_max.default: lambda t, eq, x: _bounded("minimum", t, x, eq.args[1]),
    aten.maximum.default: _call("maximum"), aten.minimum.default: _call("minimum"),
    aten.pow.Tensor_Scalar: _power, aten.pow.Scalar: _call("pow"), aten.pow.Tensor_Tensor: _call("pow"),
    aten.addcmul.default: _add_product("*"), aten.addcdiv.default: _add_product("/"),
    aten.lerp.Scalar: _call("lerp"), aten.lerp.Tensor: _call("lerp"),
}  # fmt: skip
"""Operators on numbers of one type, the result's."""

_ONE_OPERAND = {
    aten.pow.Tensor_Scalar, aten.clamp.default, aten.clamp_min.default, aten.clamp_max.default, aten.leaky_relu.default,
    aten.softplus.default, aten.hardtanh.default, aten.gelu.default,
}  # fmt: skip
_TWO_OPERANDS = {
    aten.add.Tensor, aten.sub.Tensor, aten.rsub.Tensor, aten.add.Scalar, aten.sub.Scalar, aten.rsub.Scalar,
    aten.threshold_backward.default, aten.gelu_backward.default,
}  # fmt: skip
"""Operators whose further arguments are settings rather than operands."""

COMPARISONS = {
    getattr(getattr(aten, name), overload): symbol
    for name, symbol in {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">="}.items()
    for overload in ("Tensor", "Scalar")
}
LOGIC = {
    aten.logical_and.default: "&", aten.logical_or.default: "|", aten.logical_xor.default: "^",
    aten.bitwise_and.Tensor: "&", aten.bitwise_or.Tensor: "|", aten.bitwise_xor.Tensor: "^",
}  # fmt: skip
NOT = {aten.logical_not.default, aten.bitwise_not.default}
TESTS = {
    aten.isnan.default: "{x} != {x}",
    aten.isinf.default: "abs_{t}({x}) == SET_{t}(__builtin_inf())",
}
INTEGER = {
    aten.add.Tensor, aten.add.Scalar, aten.sub.Tensor, aten.sub.Scalar, aten.rsub.Scalar, aten.mul.Tensor,
    aten.mul.Scalar, aten.neg.default, aten.abs.default, aten.maximum.default, aten.minimum.default, aten.clamp.default,
    aten.clamp_min.default, aten.clamp_max.default, aten.relu.default,
}  # fmt: skip
MOVES = {aten._to_copy.default, aten.clone.default}
SELECTS = {aten.where.self, aten.masked_fill.Scalar, aten.masked_fill.Tensor}
ELEMENTWISE = {*FLOATING, *COMPARISONS, *LOGIC, *NOT, *TESTS, *MOVES, *SELECTS, aten.full.default}

_COSTS = {
    8: ("exp", "expm1", "exp2", "log", "log1p", "log2", "sigmoid", "silu", "silu_backward", "softplus"),
    15: ("tanh", "erf", "gelu", "gelu_backward", "sin", "cos"),
    40: ("pow",),
    4: ("div", "sqrt", "rsqrt", "reciprocal", "addcdiv"),
}


def price(eq: Equation) -> int:
    """What an elementwise equation costs for each element, in additions."""
    name = eq.op.overloadpacket.__name__
    if name == "pow" and isinstance(eq.args[1], (int, float)) and eq.args[1] in (1, 2, 3, 4):
        return 1
    return next((n for n, names in _COSTS.items() if name in names), 1)


def supported(eq: Equation) -> bool:
    """Is this an elementwise equation with an entry here, on types that have a letter?"""
    y = eq.outputs
    if eq.op not in ELEMENTWISE or not isinstance(y, Value) or y.fake.numel() == 0:
        return False
    values = [*eq.inputs, y]
    if any(v.dtype not in LETTERS or v.device.type != "cpu" for v in values):
        return False
    letter = LETTERS[y.dtype]
    if eq.op is aten.full.default:
        return isinstance(eq.args[1], (int, float, bool)) and y.fake.dim() > 0
    if not eq.inputs:
        return False
    if eq.op in FLOATING:
        if eq.op is aten.pow.Scalar and letter != "d":
            return False
        if eq.op is aten.round.default and letter == "l" or any(isinstance(a, complex) for a in eq.args):
            return False
        return letter in "fd" or letter == "l" and eq.op in INTEGER and all(v.dtype == torch.int64 for v in values)
    if eq.op in COMPARISONS or eq.op in LOGIC and letter == "b":
        return True
    if eq.op in NOT:
        return eq.args[0].dtype == torch.bool
    if eq.op in TESTS:
        return LETTERS[eq.args[0].dtype] in "fd"
    if eq.op in MOVES:
        return set(eq.kwargs) <= {"dtype", "memory_format"} and not out_of_order(eq.args[0], y)
    return eq.op in SELECTS and letter in "fdl"


def expression(eq: Equation, operand: Callable[[Any, str], str]) -> str:
    """The equation as C; `operand(x, letter)` is a value or Python number converted to a type."""
    op, t = eq.op, LETTERS[eq.outputs.dtype]
    if op in FLOATING:
        arguments = eq.args[: 1 if op in _ONE_OPERAND else 2 if op in _TWO_OPERANDS else 3]
        return FLOATING[op](t, eq, *(operand(a, t) for a in arguments))
    if op in COMPARISONS:
        dtype = common_type(eq.args)
        wide = LETTERS.get(dtype, "d")
        a, b = (_rounded(operand(x, wide), dtype) for x in eq.args[:2])
        number = "-" if wide == "b" else ""  # true is -1
        return f"(MASK_{wide}({number}{a} {COMPARISONS[op]} {number}{b}))"
    if op in LOGIC:
        return f"({operand(eq.args[0], 'b')} {LOGIC[op]} {operand(eq.args[1], 'b')})"
    if op in NOT:
        return f"(~{operand(eq.args[0], 'b')})"
    if op in TESTS:
        dtype = eq.args[0].dtype
        own = LETTERS[dtype]
        return f"(MASK_{own}({TESTS[op].format(x=_rounded(operand(eq.args[0], own), dtype), t=own)}))"
    if op in MOVES:
        x, dtype = operand(eq.args[0], t), eq.outputs.dtype
        return x if eq.args[0].dtype == dtype else _rounded(x, dtype)
    if op is aten.full.default:
        return constant(t, eq.args[1])
    mask, a, b = eq.args if op is aten.where.self else (eq.args[1], eq.args[2], eq.args[0])
    return f"SELECT_{t}({operand(mask, 'b')}, {operand(a, t)}, {operand(b, t)})"


def common_type(args: tuple) -> torch.dtype:
    """The type in which two operands are compared."""
    return torch.result_type(*(a.fake if isinstance(a, Value) else a for a in args[:2]))


def _rounded(x: str, dtype: torch.dtype) -> str:
    """A number as it would be stored."""
    half = STORED.get(dtype, ("",))[0]
    return f"round_{half}({x})" if half in ("bf", "h") else x
