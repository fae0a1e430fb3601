"""C for fused groups.

A kernel runs over the group's elements in the order they lie in memory. Neighbouring dimensions are merged where every
operand allows it, so most groups have one or two left. The innermost is cut into vectors. Threads share tasks: blocks
of the innermost dimension, or several rows of it if it is short; a group that reduces or normalises rows takes whole
rows, with one loop over the row for each step (`layout.py`). Sums are taken task by task and added up in order, so
they don't depend on the number of threads.

Sizes and outer strides are parameters: groups that differ in nothing else share one function.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path
from typing import Any

import torch

from ...graph.ir import Value
from ...kernels.native import prelude
from ...kernels.toolchain import compiler, load_many
from ..pointwise import STORED
from .fused import Fused
from .layout import Layout, Loop, Node

BLOCK = 4096
"""Elements that a task takes of the innermost dimension at once."""
SERIAL = 32768
"""Elements below which a kernel runs on one thread."""
COLUMN_TASKS = 32
"""The most tasks of a kernel that sums columns, each of which has a row of partial sums."""
C_TYPE = {"f": "float", "d": "double", "l": "long", "b": "unsigned char"}
AHEAD = 8
"""Rows by which a prologue fetches what it reads ahead."""
FILES = min(4, os.cpu_count() or 1)
"""Files that the kernels of one program are spread over, to compile side by side. Each costs the compiler as much as a small kernel
does."""


_built: dict[tuple, Any] = {}
"""Functions by what they were compiled from: programs of other shapes share them."""


def functions(texts: Iterable[str]) -> dict[str, Any]:
    """The C functions of these texts, which call theirs KERNEL, compiled unless they were before. Raises KernelError as
    the toolchain does."""
    texts = list(dict.fromkeys(texts))
    head = prelude() + _vector_math()
    built_with = (head, compiler())
    missing = sorted((text for text in texts if (*built_with, text) not in _built), key=len)
    name = {text: f"kernel{n}" for n, text in enumerate(missing)}
    files = [missing[n::FILES] for n in range(min(FILES, len(missing)))]
    bodies = ["\n".join(text.replace("KERNEL", name[text]) for text in file) for file in files]
    for file, library in zip(files, load_many([(head + body, "fused") for body in bodies])):
        _built.update({(*built_with, text): getattr(library, name[text]) for text in file})
    return {text: _built[(*built_with, text)] for text in texts}


@cache
def _vector_math() -> str:
    return Path(__file__).with_name("vector_math.h").read_text()


def caller(function: Any, group: Fused) -> Callable[[tuple, tuple, dict], None]:
    """`run(outputs, inputs, kwargs)`, which fills preallocated outputs: the compiled `source` with the sizes and strides of the group's
    parts."""
    numbers: list[int] = []
    read: list[int] = []  # which argument, or which result, each pointer is
    inputs_at = {v: i for i, v in enumerate(group.graph.inputs)}
    outputs_at = {v: len(inputs_at) + i for i, v in enumerate(group.graph.outputs)}
    for layout in group.layouts:
        numbers += sizes_and_strides(layout)
        read += [inputs_at[v] for v, _ in layout.operands] + [outputs_at[r.value] for r in layout.results]
    sizes, count = (ctypes.c_long * len(numbers))(*numbers), len(group.layouts)
    places = ctypes.c_void_p * len(read)
    last: tuple[list[int], Any] = ([], None)  # addresses, and the array of pointers made of them: mostly those of the next call
    # c_void_p, which takes any array: groups of another number of parts may share the function
    function.argtypes, function.restype = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_long], None
    checked = False

    def run(outputs: tuple, inputs: tuple, kwargs: dict) -> None:
        nonlocal checked, last
        if not checked:
            given = inputs
            inputs = as_planned(given, group.graph.inputs)
            checked = all(a is b for a, b in zip(given, inputs))
        at = [t.data_ptr() for t in inputs] + [t.data_ptr() for t in outputs]
        known, pointers = last
        if at != known:
            pointers = places(*[at[i] for i in read])
            last = at, pointers
        function(pointers, sizes, count)

    return run


def as_planned(tensors: tuple, values: list[Value]) -> tuple:
    """The tensors laid out as these values, copies where need be: an operator may lay out its result otherwise than its fake
    one did."""
    return tuple(
        t if (t.shape, t.stride()) == (v.shape, v.strides) else torch.empty_strided(v.shape, v.strides, dtype=t.dtype).copy_(t)
        for t, v in zip(tensors, values)
    )


def sizes_and_strides(layout: Layout) -> list[int]:
    """The parameters of a kernel for this layout."""
    numbers = list(layout.sizes)
    for strides in _placed(layout):
        numbers += strides[:-1] if layout.inner(strides) < 2 else strides
    return numbers


def _placed(layout: Layout) -> list[tuple[int, ...]]:
    """Strides of everything that has a place in the iteration space: operands, then results that aren't sums."""
    return [s for _, s in layout.operands] + [r.strides for r in layout.results if r.kind in ("full", "row")]


def source(layout: Layout) -> str:
    """The C function for groups laid out like this one, named KERNEL; it takes several, one after the other in
    `all_pointers` and `all_sizes`, and shares all their tasks out among the threads together."""
    return _Writer(layout).function()


def epilogue_source(layout: Layout, tile: int) -> str:
    """The C function, named KERNEL, that has a product computed (`kernels/matmul`) and does what the group does to each of
    its tiles: operand number `tile` is the product, which is never in memory as a whole."""
    return _Writer(layout, f"x{tile}").epilogue()


def prologue_source(layout: Layout) -> str:
    """The C function, named KERNEL, that makes part of the group's only result, as a product packs it."""
    return _Writer(layout, "y0").prologue()


class _Writer:
    def __init__(self, layout: Layout, tile: str = ""):
        """`tile`: the name of what isn't in memory but in a tile that is given."""
        self.layout = layout
        self.tile = tile
        self.last = len(layout.sizes) - 1
        self.pointers = len(layout.operands) + len(layout.results)
        self.totals = [r for r in layout.results if r.kind == "all"]
        self.columns = [r for r in layout.results if r.kind == "column"]
        self.name = {id(r): f"y{i}" for i, r in enumerate(layout.results)}

    def function(self) -> str:
        layout, last = self.layout, self.last
        head, place = self._parameters()
        start = self._start_of_row()
        totals = len(self.totals)
        before = [f"double total{i} = 0;" for i in range(totals)] + self._column_sums("sums + column_start[low]", "task", "0")
        after = [f"partial[global * {totals} + {i}] = total{i};" for i in range(totals)]
        scratch = self._scratch("longest")
        line, deep = "\n            ", "\n                "
        per = f"n{last} < {BLOCK} ? {BLOCK} / n{last} : 1"
        if self.columns:
            per = f"(rows + {COLUMN_TASKS - 1}) / {COLUMN_TASKS} > ({per}) ? (rows + {COLUMN_TASKS - 1}) / {COLUMN_TASKS} : ({per})"
        blocks = "1" if layout.columns else f"(n{last} + {BLOCK - 1}) / {BLOCK}"
        shape = f"""const long *sizes = all_sizes + part * {self._numbers()};
        long rows = {" * ".join(f"sizes[{k}]" for k in range(last)) or "1"}, n{last} = sizes[{last}], blocks = {blocks}, per = {per};"""
        return f"""
void KERNEL(void **all_pointers, const long *all_sizes, long parts) {{
    long start[parts + 1], column_start[parts + 1], work = 0, longest = 0;
    start[0] = column_start[0] = 0;
    for (long part = 0; part < parts; part++) {{
        {shape}
        long tasks = blocks * ((rows + per - 1) / per);
        start[part + 1] = start[part] + tasks;
        column_start[part + 1] = column_start[part] + tasks * n{last} * {len(self.columns) * 8};
        work += rows * n{last};
        longest = n{last} > longest ? n{last} : longest;
    }}
    {f"double *partial = __builtin_malloc(sizeof(double) * start[parts] * {totals});" if totals else ""}
    {"char *sums = __builtin_malloc(column_start[parts]);" if self.columns else ""}
    #pragma omp parallel if (work > {SERIAL})
    {{
        {f"char *scratch = __builtin_malloc({layout.kept} * 8 * longest);" if layout.kept else ""}
        {line.join(scratch)}
        #pragma omp for schedule(static)
        for (long global = 0; global < start[parts]; global++) {{
            long low = 0, high = parts; /* start[low] <= global < start[high] */
            while (high - low > 1) {{ long mid = (low + high) / 2; if (start[mid] <= global) low = mid; else high = mid; }}
            const long part = low;
            void **pointers = all_pointers + part * {self.pointers};
            {shape}
            {line.join(head)}
            long task = global - start[part], first = task / blocks * per, begin = task % blocks * {BLOCK};
            long end = first + per < rows ? first + per : rows;
            const long columns = n{last}, count = {f"n{last}" if layout.columns else f"n{last} - begin < {BLOCK} ? n{last} - begin : {BLOCK}"};
            {line.join(before)}
            for (long row = first; row < end; row++) {{
                {deep.join(place)}
                {deep.join(start)}
                {deep.join(self._row())}
            }}
            {line.join(after)}
        }}
        {"__builtin_free(scratch);" if layout.kept else ""}
    }}
    {self._finish(shape)}
}}
"""

    def epilogue(self) -> str:
        layout, last = self.layout, self.last
        head, place = self._parameters()
        line = "\n    "
        before = self._column_sums("context->sums", "block", "begin")
        sums = f"__builtin_malloc(blocks * {len(self.columns) * 8} * sizes[{last}])" if self.columns else "0"
        rows = " * ".join(f"sizes[{k}]" for k in range(last)) or "1"
        return f"""
struct KERNEL_context {{ void **pointers; const long *sizes; char *sums; }};
static void KERNEL_tile(const struct KERNEL_context *context, void *tile, long stride, long block, long first, long height,
                        long begin, long count) {{
    void **pointers = context->pointers;
    const long *sizes = context->sizes, n{last} = sizes[{last}], columns = n{last};
    {line.join(head)}
    {f"char *scratch = __builtin_malloc({layout.kept} * 8 * count);" if layout.kept else ""}
    {line.join(self._scratch("count"))}
    {line.join(before)}
    {self._rows_of_tile(place)}
    {"__builtin_free(scratch);" if layout.kept else ""}
}}
void KERNEL(void **all_pointers, const long *all_sizes, void (*product)(), void **operands, const long *numbers, long blocks) {{
    const long *sizes = all_sizes, start[] = {{0, blocks}}, column_start[] = {{0}}, parts = 1;
    char *sums = {sums};
    struct KERNEL_context context = {{all_pointers, sizes, sums}};
    product(operands[0], operands[1], operands[2], (void *)0, numbers, KERNEL_tile, &context, (void *)0, operands[3], operands[4]);
    {self._finish(f"long rows = {rows}, n{last} = sizes[{last}];")}
}}
"""

    def prologue(self) -> str:
        head, place = self._parameters()
        line = "\n    "
        return f"""
void KERNEL(void **pointers, const long *sizes, void *tile, long stride, long first, long height, long begin, long count) {{
    {line.join(head)}
    {self._rows_of_tile(place)}
}}
"""

    def _rows_of_tile(self, place: list[str]) -> str:
        deep = "\n        "
        return f"""for (long row = first; row < first + height; row++) {{
        {deep.join(place)}
        {deep.join(self._start_of_row())}
        {deep.join(self._row())}
    }}"""

    def _column_sums(self, memory: str, number: str, begin: str) -> list[str]:
        """Where a task's sums of columns are, from column `begin` on; they begin as zeros."""
        lines = []
        for i, r in enumerate(self.columns):
            c, at = C_TYPE[r.node.t], f"({number} * {len(self.columns)} + {i}) * n{self.last} + {begin}"
            lines.append(f"{c} *column{i} = ({c} *)({memory}) + {at};")
            lines.append(f"for (long c = 0; c < count; c++) column{i}[c] = 0;")
        return lines

    def _scratch(self, longest: str) -> list[str]:
        kept = [n for n in self.layout.nodes if n.kept is not None]
        return [f"{C_TYPE[n.t]} *kept{n.kept} = (void *)(scratch + {n.kept} * 8 * {longest});" for n in kept]

    def _numbers(self) -> int:
        layout = self.layout
        return len(layout.sizes) + sum(self.last + (layout.inner(s) == 2) for s in _placed(layout))

    def _pointer_names(self) -> list[tuple[str, Any, tuple[int, ...], int]]:
        """Name, dtype, strides and position among the pointers of all that has a place."""
        layout = self.layout
        found = [(f"x{i}", v.dtype, s, i) for i, (v, s) in enumerate(layout.operands)]
        for i, r in enumerate(layout.results):
            if r.kind in ("full", "row"):
                found.append((f"y{i}", r.value.dtype, r.strides, len(layout.operands) + i))
        return found

    def _parameters(self) -> tuple[list[str], list[str]]:
        """Reading sizes and strides; and the pointers' places at the beginning of a row or block."""
        layout, last = self.layout, self.last
        head = [f"const long n{k} = sizes[{k}];" for k in range(last)]
        place = ["long rest = row;"] if last else []
        place += [f"long i{k} = rest % n{k}; rest /= n{k};" for k in reversed(range(1, last))] + (["long i0 = rest;"] if last else [])
        number = last + 1
        for name, dtype, strides, at in self._pointer_names():
            inner = layout.inner(strides)
            steps = last + (inner == 2)
            head += [f"const long {name}_{k} = sizes[{number + k}];" for k in range(steps)]
            number += steps
            offset = "".join(f" + i{k} * {name}_{k}" for k in range(last))
            offset += ("", " + begin", f" + begin * {name}_{last}")[inner]
            c = STORED[dtype][1]
            if name == self.tile:
                place.append(f"{c} *{name} = ({c} *)tile + (row - first) * stride;")
                continue
            place.append(f"{c} *{name} = ({c} *)pointers[{at}]{offset};")
        return head, place

    def _start_of_row(self) -> list[str]:
        """Operands that are the same all along a row."""
        lines = []
        for n in self.layout.nodes:
            if n.operand is not None and self._fixed(n):
                v, _ = self.layout.operands[n.operand]
                lines.append(f"{n.t} {n.name} = SET_ALL_{STORED[v.dtype][0]}(*x{n.operand});")
        return lines

    def _fixed(self, n: Node) -> bool:
        return n.operand is not None and self.layout.inner(self.layout.operands[n.operand][1]) == 0

    def _row(self) -> list[str]:
        """The loops over a row, what is computed between them, and the row's own results."""
        lines = []
        for s, loop in enumerate(self.layout.loops):
            lines += self._between(s)
            lines += self._loop(s, loop)
        lines += self._between(len(self.layout.loops))
        for i, r in enumerate(self.layout.results):
            if r.kind == "row":
                lines.append(f"store_some_{STORED[r.value.dtype][0]}(y{i}, {r.node.name}, 1);")
        return lines

    def _between(self, s: int) -> list[str]:
        return [f"{n.t} {n.name} = {n.text};" for n in self.layout.rows if n.text and n.stage == s]

    def _loop(self, s: int, loop: Loop) -> list[str]:
        before, fold, lines = [], [], []
        for n in loop.folds:
            t = n.t
            empty = {"sum": "0", "maximum": "-__builtin_inf()", "minimum": "__builtin_inf()"}[n.fold]
            before.append(f"{t} a_{n.name} = SET_{t}({empty});" + (f" double s_{n.name} = 0;" if n.fold == "sum" else ""))
            if n.fold == "sum":
                fold.append(f"s_{n.name} += FOLD_sum_{t}(a_{n.name}); a_{n.name} = ({t}){{}};")
        for r in loop.sums:
            if r.kind == "all":
                i = self.totals.index(r)
                before.append(f"{r.node.t} a_total{i} = {{}};")
                fold.append(f"total{i} += FOLD_sum_{r.node.t}(a_total{i}); a_total{i} = ({r.node.t}){{}};")
        whole, some = ("\n                        ".join(self._body(s, loop, tail)) for tail in (False, True))
        lines += before
        lines.append(f"""for (long base = 0; base < count; base += {BLOCK}) {{
                    long i = base, stop = base + {BLOCK} < count ? base + {BLOCK} : count;
                    for (; i + L <= stop; i += L) {{
                        {whole}
                    }}
                    if (i < stop) {{
                        long n = stop - i;
                        {some}
                    }}
                    {" ".join(fold)}
                }}""")
        for n in loop.folds:
            value = f"s_{n.name}" if n.fold == "sum" else f"FOLD_{n.fold}_{n.t}(a_{n.name})"
            lines.append(f"{n.t} {n.name} = SET_{n.t}({value});")
        return lines

    def _body(self, s: int, loop: Loop, tail: bool) -> list[str]:
        """The statements for one vector of elements; in the tail for its first n lanes."""
        layout, lines = self.layout, []

        def load(letter: str, p: str) -> str:
            return f"load_some_{letter}({p} + i, n)" if tail else f"load_{letter}({p} + i)"

        def store(letter: str, p: str, x: str) -> str:
            return f"store_some_{letter}({p} + i, {x}, n);" if tail else f"store_{letter}({p} + i, {x});"

        for n in loop.nodes:
            if n.kept is not None and layout.first[n] < s:
                lines.append(f"{n.t} {n.name} = {load(n.t, f'kept{n.kept}')};")
            elif n.operand is None:
                lines.append(f"{n.t} {n.name} = {n.text};")
            elif not self._fixed(n):
                v, strides = layout.operands[n.operand]
                letter, p = STORED[v.dtype][0], f"x{n.operand}"
                step = f"{p}_{self.last}"
                apart = f"load_apart_{letter}({p} + i * {step}, {step}, {'n' if tail else 'L'})"
                lines.append(f"{n.t} {n.name} = {load(letter, p) if layout.inner(strides) == 1 else apart};")
                if self.tile == "y0" and self.last and not tail:  # part of a row at a time, which the CPU doesn't foresee
                    lines.append(f"__builtin_prefetch({p} + {AHEAD} * {p}_{self.last - 1} + i);")
        for n in loop.folds:
            x, a, t = n.operands[0].name, f"a_{n.name}", n.t
            if n.fold == "sum":
                lines.append(f"{a} += " + (f"FIRST_{t}({x}, n);" if tail else f"{x};"))
            else:
                new = f"{n.fold}_{t}({a}, {x})"
                lines.append(f"{a} = " + (f"LIMIT_{t}({new}, {a}, n);" if tail else f"{new};"))
        for r in loop.sums:
            x, t = r.node.name, r.node.t
            if r.kind == "all":
                lines.append(f"a_total{self.totals.index(r)} += " + (f"FIRST_{t}({x}, n);" if tail else f"{x};"))
            else:
                p = f"column{self.columns.index(r)}"
                lines.append(store(t, p, f"{load(t, p)} + {x}"))
        for n in loop.keeps:
            lines.append(store(n.t, f"kept{n.kept}", n.name))
        for r in loop.stores:
            lines.append(store(STORED[r.value.dtype][0], self.name[id(r)], r.node.name))
        return lines

    def _finish(self, shape: str) -> str:
        """Adding up the tasks' sums."""
        if not self.totals and not self.columns:
            return ""
        last, lines = self.last, []
        at = lambda r: f"all_pointers[part * {self.pointers} + {len(self.layout.operands) + self.layout.results.index(r)}]"
        for i, r in enumerate(self.totals):
            store = f"store_some_{STORED[r.value.dtype][0]}({at(r)}, SET_{r.node.t}(all{' / (rows * n' + str(last) + ')' if r.mean else ''}), 1);"
            lines.append(
                f"{{ double all = 0; for (long t = start[part]; t < start[part + 1]; t++) all += partial[t * {len(self.totals)} + {i}]; {store} }}"
            )
        for i, r in enumerate(self.columns):
            t, letter = r.node.t, STORED[r.value.dtype]
            c = C_TYPE[t]
            lines.append(f"""{{ long tasks = start[part + 1] - start[part]; {c} *p = ({c} *)(sums + column_start[part]) + {i} * n{last};
        for (long c = 0; c < n{last}; c += L) {{
            {t} all = {{}};
            for (long t = 0; t < tasks; t++)
                all += c + L <= n{last} ? load_{t}(p + t * {len(self.columns)} * n{last} + c) : load_some_{t}(p + t * {len(self.columns)} * n{last} + c, n{last} - c);
            {f"all = all / SET_{t}(rows);" if r.mean else ""}
            store_some_{letter[0]}(({letter[1]} *){at(r)} + c, all, n{last} - c < L ? n{last} - c : L);
        }} }}""")
        inside = "\n        ".join(lines)
        free = ("__builtin_free(partial);" if self.totals else "") + ("__builtin_free(sums);" if self.columns else "")
        return f"for (long part = 0; part < parts; part++) {{\n        {shape}\n        {inside}\n    }}\n    {free}"
