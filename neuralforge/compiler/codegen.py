"""C for fused groups.

A kernel runs over the group's elements in the order they lie in the outputs' memory. Neighbouring dimensions are
merged where every operand allows it, so most groups have one or two left. The innermost is cut into vectors; the
others and blocks of the innermost are shared out among the threads. Sums are taken block by block and added up in
order, so they don't depend on the number of threads.

Sizes and outer strides are parameters: groups that differ in nothing else share one function.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ..graph.ir import Value
from ..kernels.toolchain import load_many
from .fuse import Fused
from .pointwise import LETTERS, constant, expression

BLOCK = 4096
"""Elements of the innermost dimension that a thread takes at once."""
PARTS = 4
"""Files that the kernels of one program are spread over, to compile side by side."""
LANES = {"f": "float", "d": "double", "l": "long", "b": "unsigned char"}
aten = torch.ops.aten


class Layout:
    """A group's iteration space: merged dimensions, outermost first, and each operand's strides in them (elements)."""

    def __init__(self, group: Fused):
        graph = group.graph
        self.inputs = graph.inputs
        self.sums = [v for eq in graph.equations if eq.op is aten.sum.default for v in eq.results if v in graph.outputs]
        self.outputs = [v for v in graph.outputs if v not in self.sums]
        first = graph.equations[0]
        over = first.args[0] if first.op is aten.sum.default else first.outputs
        shape = tuple(over.shape)
        order = sorted((i for i, n in enumerate(shape) if n != 1), key=lambda i: -over.strides[i])
        strides = {v: _broadcast_strides(v, shape) for v in (*self.inputs, *self.outputs)}
        dims: list[tuple[int, dict[Value, int]]] = []
        for i in order:
            step = {v: s[i] for v, s in strides.items()}
            if dims and all(dims[-1][1][v] == step[v] * shape[i] for v in step):
                dims[-1] = dims[-1][0] * shape[i], step
            else:
                dims.append((shape[i], step))
        self.sizes = [n for n, _ in dims] or [1]
        self.strides = {v: [step[v] for _, step in dims] or [0] for v in strides}

    def inner(self, v: Value) -> int:
        """Stride of the innermost dimension: 0 broadcast, 1 contiguous, 2 for any other."""
        return min(abs(self.strides[v][-1]), 2)


def build(groups: list[Fused]) -> dict[Fused, Callable[[tuple, tuple, dict], None]]:
    """Native code for `groups`: for each, `run(outputs, inputs, kwargs)` that fills preallocated outputs. Raises
    KernelError as the toolchain does."""
    layouts = {group: Layout(group) for group in groups}
    bodies: dict[str, str] = {}  # text of a function -> its name
    name_of = {}
    for group, layout in layouts.items():
        text = _function(group, layout)
        name_of[group] = bodies.setdefault(text, f"kernel{len(bodies)}")
    header = Path(__file__).with_name("vector.h").read_text()
    parts: list[list[str]] = [[] for _ in range(min(PARTS, len(bodies)))]
    for n, (text, name) in enumerate(bodies.items()):
        parts[n % len(parts)].append(text.replace("KERNEL", name))
    lanes = f"#define L {_lanes()}\n"
    libraries = load_many([(lanes + header + "\n".join(part), "fused") for part in parts])
    where = {name: libraries[n % len(parts)] for n, name in enumerate(bodies.values())}
    return {group: _caller(getattr(where[name_of[group]], name_of[group]), layouts[group], group) for group in groups}


def _lanes() -> int:
    from ..kernels.toolchain import isa

    return {"avx512": 16, "avx2": 8, "portable": 4}[isa()]


def _caller(function: Any, layout: Layout, group: Fused) -> Callable[[tuple, tuple, dict], None]:
    """Bind a C function to a group's sizes and strides."""
    operands = [*layout.inputs, *layout.outputs]
    numbers = [*layout.sizes]
    for v in operands:
        numbers += layout.strides[v][:-1] if layout.inner(v) < 2 else layout.strides[v]
    sizes = (ctypes.c_long * len(numbers))(*numbers)
    pointers = ctypes.c_void_p * (len(operands) + len(layout.sums))
    function.argtypes, function.restype = [pointers, ctypes.c_void_p], None
    expected = [(tuple(v.shape), tuple(v.strides)) for v in group.graph.inputs]
    where = [group.graph.outputs.index(v) for v in (*layout.outputs, *layout.sums)]
    checked = False

    def run(outputs: tuple, inputs: tuple, kwargs: dict) -> None:
        nonlocal checked
        if not checked:  # an operator may lay out its result otherwise than its fake one did
            inputs = tuple(
                t if (tuple(t.shape), t.stride()) == e else torch.empty_strided(*e, dtype=t.dtype).copy_(t)
                for t, e in zip(inputs, expected)
            )
            checked = all((tuple(t.shape), t.stride()) == e for t, e in zip(inputs, expected))
        function(pointers(*[t.data_ptr() for t in inputs], *[outputs[i].data_ptr() for i in where]), sizes)

    return run


def _function(group: Fused, layout: Layout) -> str:
    names = {v: f"x{i}" for i, v in enumerate(layout.inputs)}
    names.update((v, f"y{i}") for i, v in enumerate(layout.outputs))
    names.update((v, f"s{i}") for i, v in enumerate(layout.sums))
    operands = [*layout.inputs, *layout.outputs]
    depth = len(layout.sizes)
    head, next_number = [f"long n{k} = sizes[{k}];" for k in range(depth)], depth
    for i, v in enumerate(operands):
        kind = LANES[LETTERS[v.dtype]]
        head.append(f"{kind} *{names[v]} = pointers[{i}];")
        count = depth - 1 if layout.inner(v) < 2 else depth
        for k in range(count):
            head.append(f"long {names[v]}_{k} = sizes[{next_number + k}];")
        next_number += count
    outer = " * ".join(f"n{k}" for k in range(depth - 1)) or "1"
    place = []  # where this block begins, for every operand
    for k in reversed(range(depth - 1)):
        place.append(f"long i{k} = rest % n{k}; rest /= n{k};")
    for v in operands:
        steps = "".join(f" + i{k} * {names[v]}_{k}" for k in range(depth - 1))
        begin = {0: "", 1: " + begin", 2: f" + begin * {names[v]}_{depth - 1}"}[layout.inner(v)]
        place.append(f"{LANES[LETTERS[v.dtype]]} *p_{names[v]} = {names[v]}{steps}{begin};")
    for i, v in enumerate(layout.sums):
        head.append(f"double *partial{i} = __builtin_malloc(sizeof(double) * tasks);")
        place.append(f"{LETTERS[v.dtype]} total{i} = {{}};")
    once = [f"{LETTERS[v.dtype]} v_{names[v]} = SET_ALL_{LETTERS[v.dtype]}(*p_{names[v]});" for v in layout.inputs if layout.inner(v) == 0]
    whole, some = (_body(group, layout, names, tail) for tail in (False, True))
    finish = []
    for i, v in enumerate(layout.sums):
        finish.append(f"double sum{i} = 0; for (int j = 0; j < L; j++) sum{i} += total{i}[j]; partial{i}[task] = sum{i};")
    end = []
    for i, v in enumerate(layout.sums):
        kind = LANES[LETTERS[v.dtype]]
        end.append(f"double all{i} = 0; for (long task = 0; task < tasks; task++) all{i} += partial{i}[task];")
        end.append(f"*({kind} *)pointers[{len(operands) + i}] = ({kind})all{i}; __builtin_free(partial{i});")
    lines = "\n    "
    return f"""
void KERNEL(void **pointers, const long *sizes) {{
    {lines.join(h for h in head if not h.startswith("double *partial"))}
    long blocks = (n{depth - 1} + {BLOCK - 1}) / {BLOCK}, tasks = ({outer}) * blocks;
    {lines.join(h for h in head if h.startswith("double *partial"))}
    #pragma omp parallel for schedule(static) if (({outer}) * n{depth - 1} > 8192)
    for (long task = 0; task < tasks; task++) {{
        long rest = task / blocks, begin = task % blocks * {BLOCK};
        long count = n{depth - 1} - begin < {BLOCK} ? n{depth - 1} - begin : {BLOCK};
        {(lines + "    ").join([*place, *once])}
        long i = 0;
        for (; i + L <= count; i += L) {{
            {whole}
        }}
        if (i < count) {{
            long n = count - i;
            {some}
        }}
        {(lines + "    ").join(finish)}
    }}
    {lines.join(end)}
}}
"""


def _body(group: Fused, layout: Layout, names: dict[Value, str], tail: bool) -> str:
    """The statements for one vector of elements; in the tail for its first n lanes."""
    lines, n = [], "n" if tail else "L"
    local = {v: f"v_{names[v]}" for v in layout.inputs}
    for v in layout.inputs:
        t, p = LETTERS[v.dtype], f"p_{names[v]}"
        if layout.inner(v) == 1:
            lines.append(f"{t} {local[v]} = " + (f"load_some_{t}({p} + i, n);" if tail else f"load_{t}({p} + i);"))
        elif layout.inner(v) == 2:
            step = f"{names[v]}_{len(layout.sizes) - 1}"
            lines.append(f"{t} {local[v]} = load_apart_{t}({p} + i * {step}, {step}, {n});")

    def operand(x: Any, t: str) -> str:
        if not isinstance(x, Value):
            return constant(t, x)
        own = LETTERS[x.dtype]
        return local[x] if own == t else f"{t}_from_{own}({local[x]})"

    for i, eq in enumerate(group.graph.equations):
        if eq.op is aten.sum.default:
            if eq.outputs in layout.sums:
                x, s = operand(eq.args[0], LETTERS[eq.outputs.dtype]), layout.sums.index(eq.outputs)
                t = LETTERS[eq.outputs.dtype]
                lines.append(f"total{s} += FIRST_{t}({x}, n);" if tail else f"total{s} += {x};")
            continue
        local[eq.outputs] = f"t{i}"
        lines.append(f"{LETTERS[eq.outputs.dtype]} t{i} = {expression(eq, operand)};")
    for v in layout.outputs:
        t, p = LETTERS[v.dtype], f"p_{names[v]}"
        lines.append(f"store_some_{t}({p} + i, {local[v]}, n);" if tail else f"store_{t}({p} + i, {local[v]});")
    return "\n            ".join(lines)


def _broadcast_strides(v: Value, shape: tuple) -> list[int]:
    """Strides of `v` as if expanded to `shape`."""
    lead = len(shape) - v.fake.dim()
    return [0] * lead + [0 if n == 1 else s for n, s in zip(v.shape, v.strides)]
