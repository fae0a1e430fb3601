"""The program: an ordered list of typed equations over tensor values (after JAX's jaxpr).

    v7:f32[8,256,384] = aten.mul.Tensor(v3, v5)   # model.py:41

A `Value` is a tensor known by shape, dtype, strides and device (held as a fake tensor, so it costs no memory and
operators can be re-traced on it). An `Equation` applies one operator; its arguments and results are trees (lists,
tuples) with Values at the leaves. A `Graph` is a callable: called with tensors it interprets itself, so a graph can
be captured again, differentiated, or run on fake tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import torch

DTYPE_NAMES = {
    torch.float64: "f64", torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16",
    torch.int64: "i64", torch.int32: "i32", torch.int16: "i16", torch.int8: "i8", torch.uint8: "u8",
    torch.bool: "bool", torch.complex64: "c64", torch.complex128: "c128",
}  # fmt: skip


class Value:
    """One tensor in a graph. `fake` carries its shape, dtype, strides and device, which are asked for again and again, and so
    kept here too; `name` is unique in its graph."""

    __slots__ = ("name", "fake", "shape", "strides", "dtype", "device")

    def __init__(self, name: str, fake: torch.Tensor):
        self.name, self.fake = name, fake
        self.shape, self.strides, self.dtype, self.device = fake.shape, fake.stride(), fake.dtype, fake.device

    @property
    def nbytes(self) -> int:
        """Bytes of the elements (not of the storage a view looks into)."""
        return self.fake.numel() * self.fake.element_size()

    @property
    def pending(self) -> tuple[bool, bool]:
        """Are the conjugate, the negative, of the numbers in memory meant? A copy makes them so."""
        return self.fake.is_conj(), self.fake.is_neg()

    @property
    def typed(self) -> str:
        dims = ",".join(str(int(d)) for d in self.shape)
        strides = "" if self.fake.is_contiguous() else "'" + ",".join(str(int(s)) for s in self.strides)
        return f"{self.name}:{DTYPE_NAMES.get(self.dtype, str(self.dtype))}[{dims}]{strides}"

    def __repr__(self) -> str:
        return self.name


@dataclass(eq=False, slots=True)
class Equation:
    """`outputs = op(*args, **kwargs)`. `op` is a torch operator overload, or a callable that holds a `graph`. Never changed
    once made: graphs share equations."""

    op: Callable[..., Any]
    args: tuple
    kwargs: dict
    outputs: Any
    source: str = ""
    """The user's line: `model.py:41`."""
    origin: str = ""
    """What made it when it isn't the user's own call: `vjp of aten.mul`, `recomputed`, `fuse`."""

    inputs: tuple[Value, ...] = field(init=False, repr=False)
    """The values read, in order, repeats included."""
    results: tuple[Value, ...] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self.inputs, self.results = (*leaves(self.args), *leaves(self.kwargs)), tuple(leaves(self.outputs))

    def reading(self, env: dict[Value, Any]) -> Equation:
        """The equation with each Value it reads replaced by what `env` holds for it; itself where `env` has none of them."""
        if env.keys().isdisjoint(self.inputs):
            return self
        args, kwargs = substitute(self.args, env), substitute(self.kwargs, env)
        return Equation(self.op, args, kwargs, self.outputs, self.source, self.origin)

    @property
    def name(self) -> str:
        return op_name(self.op)

    def __repr__(self) -> str:
        arguments = [_literal(a) for a in self.args] + [f"{k}={_literal(v)}" for k, v in self.kwargs.items()]
        results = ", ".join(v.typed for v in self.results) or "_"
        note = "  ".join(part for part in (self.source, f"[{self.origin}]" if self.origin else "") if part)
        return f"{results} = {self.name}({', '.join(arguments)})" + (f"   # {note}" if note else "")


@dataclass(eq=False)
class Graph:
    """A straight-line program. `inputs` are its parameters, `constants` the tensors it closes over (by reference),
    `outputs` a list of Values and plain Python constants."""

    inputs: list[Value] = field(default_factory=list)
    constants: dict[Value, torch.Tensor] = field(default_factory=dict)
    equations: list[Equation] = field(default_factory=list)
    outputs: list[Any] = field(default_factory=list)

    def __call__(self, *tensors: Any) -> list[Any]:
        """Interpret the program on `tensors`, one for each input, freeing each value after its last use."""
        if len(tensors) != len(self.inputs):
            raise TypeError(f"the graph takes {len(self.inputs)} inputs, not {len(tensors)}")
        env: dict[Value, Any] = dict(zip(self.inputs, tensors))
        env.update(self.constants)
        for eq, dead in zip(self.equations, self.last_uses()):
            result = eq.op(*substitute(eq.args, env), **substitute(eq.kwargs, env))
            bind(eq.outputs, result, env)
            for value in dead:
                del env[value]
        return [env[v] if isinstance(v, Value) else v for v in self.outputs]

    def last_uses(self) -> list[list[Value]]:
        """For each equation, the values nobody reads after it (inputs and constants included)."""
        seen = {v for v in self.outputs if isinstance(v, Value)}
        dead: list[list[Value]] = []
        for eq in reversed(self.equations):
            last = [v for v in dict.fromkeys([*eq.inputs, *eq.results]) if v not in seen]
            seen.update(last)
            dead.append(last)
        return dead[::-1]

    def users(self) -> dict[Value, list[Equation]]:
        """The equations that read each value."""
        table: dict[Value, list[Equation]] = {}
        for eq in self.equations:
            for v in dict.fromkeys(eq.inputs):
                table.setdefault(v, []).append(eq)
        return table

    def producers(self) -> dict[Value, Equation]:
        return {v: eq for eq in self.equations for v in eq.results}

    def replace(self, **changes: Any) -> Graph:
        return replace(self, **changes)

    def __str__(self) -> str:
        lines = ["def graph(" + ", ".join(v.typed for v in self.inputs) + "):"]
        lines += [f"    {v.typed} = constant" for v in self.constants]
        lines += [f"    {eq!r}" for eq in self.equations]
        return "\n".join([*lines, "    return " + ", ".join(str(v) for v in self.outputs)])


def op_name(op: Any) -> str:
    """`aten.mul.Tensor`, without the overload when it is the default one."""
    return str(getattr(op, "name", None) if hasattr(op, "graph") else op).removesuffix(".default")


def leaves(tree: Any) -> list[Value]:
    """The Values in a tree of tuples, lists and dicts."""
    if isinstance(tree, Value):
        return [tree]
    found: list[Value] = []
    _collect(tree.values() if isinstance(tree, dict) else tree if isinstance(tree, (tuple, list)) else (), found)
    return found


def _collect(items: Iterable[Any], found: list[Value]) -> None:
    for item in items:
        if isinstance(item, Value):
            found.append(item)
        elif isinstance(item, (tuple, list)):
            _collect(item, found)
        elif isinstance(item, dict):
            _collect(item.values(), found)


def map_tree(fn: Callable[[Any], Any], tree: Any) -> Any:
    """Apply `fn` to every leaf of a tree of tuples, lists and dicts."""
    if isinstance(tree, (tuple, list)):
        mapped = [map_tree(fn, item) for item in tree]
        return mapped if isinstance(tree, list) else tuple(mapped)
    if isinstance(tree, dict):
        return {key: map_tree(fn, item) for key, item in tree.items()}
    return fn(tree)


def substitute(tree: Any, env: dict[Value, Any]) -> Any:
    """The tree with each Value replaced by what `env` holds for it (by itself where `env` has nothing)."""
    return map_tree(lambda leaf: env.get(leaf, leaf) if isinstance(leaf, Value) else leaf, tree)


def bind(outputs: Any, result: Any, env: dict[Value, Any]) -> None:
    """Note in `env` what an equation's outputs are."""
    if isinstance(outputs, Value):
        env[outputs] = result
    elif isinstance(outputs, (tuple, list)):
        for out, res in zip(outputs, result):
            bind(out, res, env)


def _literal(tree: Any) -> str:
    if isinstance(tree, Value):
        return tree.name
    if isinstance(tree, list):
        return "[" + ", ".join(_literal(item) for item in tree) + "]"
    if isinstance(tree, tuple):
        return "(" + ", ".join(_literal(item) for item in tree) + ")"
    if isinstance(tree, torch.dtype):
        return DTYPE_NAMES.get(tree, str(tree))
    return repr(tree) if isinstance(tree, str) else str(tree)
