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
from typing import Any

import torch

from ..graph.ir import Graph, Value
from ..kernels.native import prelude
from ..kernels.toolchain import load_many
from .fuse import Fused
from .pointwise import LETTERS, constant, expression

BLOCK = 4096
"""Elements of the innermost dimension that a thread takes at once."""
SERIAL = 32768
"""Elements below which a kernel runs on one thread."""
FILES = 4
"""Files that the kernels of one program are spread over, to compile side by side."""
LANES = {"f": "float", "d": "double", "l": "long", "b": "unsigned char"}
aten = torch.ops.aten


class Layout:
    """A group's iteration space: merged dimensions, outermost first, and each operand's strides in them (elements)."""

    def __init__(self, graph: Graph):
        self.graph = graph
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
    layouts = {group: [Layout(part) for part in group.parts] for group in groups}
    bodies: dict[str, str] = {}  # text of a function -> its name
    name_of = {group: bodies.setdefault(source(layouts[group][0]), f"kernel{len(bodies)}") for group in groups}
    files: list[list[str]] = [[] for _ in range(min(FILES, len(bodies)))]
    for n, (text, name) in enumerate(bodies.items()):
        files[n % len(files)].append(text.replace("KERNEL", name))
    libraries = load_many([(prelude() + "\n".join(file), "fused") for file in files])
    where = {name: libraries[n % len(files)] for n, name in enumerate(bodies.values())}
    return {group: _caller(getattr(where[name_of[group]], name_of[group]), layouts[group], group) for group in groups}


def _caller(function: Any, layouts: list[Layout], group: Fused) -> Callable[[tuple, tuple, dict], None]:
    """Bind a C function to the sizes and strides of a group's parts."""
    numbers: list[int] = []
    read: list[int] = []  # which argument, or which result, each pointer is
    for layout in layouts:
        numbers += layout.sizes
        for v in (*layout.inputs, *layout.outputs):
            numbers += layout.strides[v][:-1] if layout.inner(v) < 2 else layout.strides[v]
        read += [group.graph.inputs.index(v) for v in layout.inputs]
        read += [len(group.graph.inputs) + group.graph.outputs.index(v) for v in (*layout.outputs, *layout.sums)]
    sizes, count = (ctypes.c_long * len(numbers))(*numbers), len(layouts)
    pointers = ctypes.c_void_p * len(read)
    # c_void_p, which takes any array: groups of another number of parts may share the function
    function.argtypes, function.restype = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_long], None
    expected = [(tuple(v.shape), tuple(v.strides)) for v in group.graph.inputs]
    checked = False

    def run(outputs: tuple, inputs: tuple, kwargs: dict) -> None:
        nonlocal checked
        if not checked:  # an operator may lay out its result otherwise than its fake one did
            given = inputs
            inputs = tuple(
                t if (tuple(t.shape), t.stride()) == e else torch.empty_strided(*e, dtype=t.dtype).copy_(t)
                for t, e in zip(given, expected)
            )
            checked = all(a is b for a, b in zip(given, inputs))
        at = [t.data_ptr() for t in inputs] + [t.data_ptr() for t in outputs]
        function(pointers(*[at[i] for i in read]), sizes, count)

    return run


def source(layout: Layout) -> str:
    """The C function for groups laid out like this one, named KERNEL; it takes several, one after the other in
    `pointers` and `sizes`, and shares all their blocks out among the threads together."""
    names = {v: f"x{i}" for i, v in enumerate(layout.inputs)}
    names.update((v, f"y{i}") for i, v in enumerate(layout.outputs))
    operands = [*layout.inputs, *layout.outputs]
    depth = len(layout.sizes)
    last = depth - 1
    letter = {v: LETTERS[v.dtype] for v in (*operands, *layout.sums)}
    outer = "".join(f" * sizes[{k}]" for k in range(last))

    head = [f"long n{k} = sizes[{k}];" for k in range(depth)]
    number = depth
    place = [f"long i{k} = rest % n{k}; rest /= n{k};" for k in reversed(range(last))]  # where the block begins
    for i, v in enumerate(operands):
        steps = last if layout.inner(v) < 2 else depth
        head += [f"long {names[v]}_{k} = sizes[{number + k}];" for k in range(steps)]
        number += steps
        offset = "".join(f" + i{k} * {names[v]}_{k}" for k in range(last))
        offset += {0: "", 1: " + begin", 2: f" + begin * {names[v]}_{last}"}[layout.inner(v)]
        place.append(f"{LANES[letter[v]]} *{names[v]} = ({LANES[letter[v]]} *)pointers[{i}]{offset};")
    place += [f"{letter[v]} {names[v]}v = SET_ALL_{letter[v]}(*{names[v]});" for v in layout.inputs if layout.inner(v) == 0]
    place += [f"{letter[v]} total{i} = {{}};" for i, v in enumerate(layout.sums)]
    after = [
        f"double sum{i} = 0; for (int j = 0; j < L; j++) sum{i} += total{i}[j]; partial[global * {len(layout.sums)} + {i}] = sum{i};"
        for i in range(len(layout.sums))
    ]
    end = [
        f"{{ double all = 0; for (long t = start[part]; t < start[part + 1]; t++) all += partial[t * {len(layout.sums)} + {i}];"
        f" *({LANES[letter[v]]} *)all_pointers[part * {len(operands) + len(layout.sums)} + {len(operands) + i}] = all; }}"
        for i, v in enumerate(layout.sums)
    ]
    whole, some = (_body(layout, names, tail) for tail in (False, True))
    line = "\n        "
    return f"""
void KERNEL(void **all_pointers, const long *all_sizes, long parts) {{
    long start[parts + 1], work = 0;
    start[0] = 0;
    for (long part = 0; part < parts; part++) {{
        const long *sizes = all_sizes + part * {number};
        long rows = 1{outer};
        start[part + 1] = start[part] + rows * ((sizes[{last}] + {BLOCK - 1}) / {BLOCK});
        work += rows * sizes[{last}];
    }}
    {f"double *partial = __builtin_malloc(sizeof(double) * start[parts] * {len(layout.sums)});" if layout.sums else ""}
    #pragma omp parallel for schedule(static) if (work > {SERIAL})
    for (long global = 0; global < start[parts]; global++) {{
        long low = 0, high = parts; /* start[low] <= global < start[high] */
        while (high - low > 1) {{ long mid = (low + high) / 2; if (start[mid] <= global) low = mid; else high = mid; }}
        void **pointers = all_pointers + low * {len(operands) + len(layout.sums)};
        const long *sizes = all_sizes + low * {number};
        {line.join(head)}
        long task = global - start[low], blocks = (n{last} + {BLOCK - 1}) / {BLOCK};
        long rest = task / blocks, begin = task % blocks * {BLOCK};
        long count = n{last} - begin < {BLOCK} ? n{last} - begin : {BLOCK};
        {line.join(place)}
        long i = 0;
        for (; i + L <= count; i += L) {{
            {whole}
        }}
        if (i < count) {{
            long n = count - i;
            {some}
        }}
        {line.join(after)}
    }}
    {"for (long part = 0; part < parts; part++) {" + line.join(end) + "}" if end else ""}
    {"__builtin_free(partial);" if end else ""}
}}
"""


def _body(layout: Layout, names: dict[Value, str], tail: bool) -> str:
    """The statements for one vector of elements; in the tail for its first n lanes."""
    lines, n = [], "n" if tail else "L"
    local = {v: f"{names[v]}v" for v in layout.inputs}
    for v in layout.inputs:
        t, p = LETTERS[v.dtype], names[v]
        if layout.inner(v) == 1:
            lines.append(f"{t} {local[v]} = " + (f"load_some_{t}({p} + i, n);" if tail else f"load_{t}({p} + i);"))
        elif layout.inner(v) == 2:
            step = f"{p}_{len(layout.sizes) - 1}"
            lines.append(f"{t} {local[v]} = load_apart_{t}({p} + i * {step}, {step}, {n});")

    def operand(x: Any, t: str) -> str:
        if not isinstance(x, Value):
            return constant(t, x)
        own = LETTERS[x.dtype]
        return local[x] if own == t else f"{t}_from_{own}({local[x]})"

    for i, eq in enumerate(layout.graph.equations):
        t = LETTERS[eq.outputs.dtype]
        if eq.op is not aten.sum.default:
            local[eq.outputs] = f"t{i}"
            lines.append(f"{t} t{i} = {expression(eq, operand)};")
        elif eq.outputs in layout.sums:
            x = operand(eq.args[0], t)
            lines.append(f"total{layout.sums.index(eq.outputs)} += " + (f"FIRST_{t}({x}, n);" if tail else f"{x};"))
    for v in layout.outputs:
        t, p = LETTERS[v.dtype], names[v]
        lines.append(f"store_some_{t}({p} + i, {local[v]}, n);" if tail else f"store_{t}({p} + i, {local[v]});")
    return "\n            ".join(lines)


def _broadcast_strides(v: Value, shape: tuple) -> list[int]:
    """Strides of `v` as if expanded to `shape`."""
    lead = len(shape) - v.fake.dim()
    return [0] * lead + [0 if n == 1 else s for n, s in zip(v.shape, v.strides)]
