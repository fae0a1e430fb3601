"""Matrix products: ATen's (MKL; oneDNN for bfloat16), oneDNN's or our own, whichever was faster for this shape on this
machine; ours where it is about as fast.

None is best everywhere: MKL reaches 85 % of the peak on Intel's processors, 80 % on AMD's with AVX2 and 40 % on those
with AVX-512; oneDNN 50 to 75 %, and over 90 % on the last. The choice is timed once for each shape and layout, near
lengths apart, and remembered on disk.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from ...graph.ir import Equation, Value
from ...kernels import matmul
from ...kernels.choices import Choices
from ...kernels.native import built_ahead
from ...kernels.toolchain import has_bfloat16, isa
from ...memory import keep_pages
from ..kernels import Kernel

aten = torch.ops.aten
PRODUCTS = {aten.mm.default, aten.addmm.default, aten.bmm.default, aten.baddbmm.default}

NEAR = 4
"""A product that differs from a timed one in one length alone, at most so many times, takes over its choice."""
LONGEST = 1024
"""Rows, columns and summands that products are timed with at most: more take longer, but no other kernel is the fastest."""
HANDICAP = {"aten": 1.08, "float32": 1.08, "onednn": 1.25}
"""By how many times these have to be faster than our kernel, with which groups are joined, and whose results need no copies. In a
program, where operands come from memory, others lose 3 to 10 % of what they reach on operands in a cache; and oneDNN allocates
within its calls, 40 MB for 50 MB of results, which no plan knows of."""
PIECE = 1024
"""Rows of oneDNN's products that are made at once, and copied while the cache still holds them."""
_NUMBER = re.compile(r"\d+")


def onednn(eq: Equation) -> Kernel | None:
    """The equation by oneDNN's inner product, x @ w.T + bias; None where it doesn't apply (it computes in float32, and
    takes a hundred times as long with gaps between rows or columns). It allocates its result, which is copied to where
    the memory plan wants it, PIECE rows at a time: left where they are, such results take 10 to 30 % more memory than
    the plan, in holes between them that malloc can't use again."""
    if not torch.backends.mkldnn.is_available() or not isinstance(eq.outputs, Value):
        return None
    if eq.kwargs or not _plain(eq.args, torch.float32) or any(v.fake.dim() == 2 and not _dense(v) for v in eq.args):
        return None
    if eq.op is not aten.mm.default:
        if eq.op is not aten.addmm.default or tuple(eq.args[0].shape) != (eq.outputs.shape[1],):
            return None
    linear = torch.ops.mkldnn._linear_pointwise.default
    rows, columns = eq.outputs.shape
    piece = PIECE if eq.args[-2].fake.is_contiguous() else rows  # of others, pieces have gaps

    def run(outputs: tuple, args: tuple, kwargs: dict) -> None:
        *bias, a, b = args
        for i in range(0, len(a), piece):  # products are timed on parts
            part = linear(a[i : i + piece], b.t(), *bias or [None], "none", [], "")
            outputs[0][i : i + piece].copy_(part)

    return Kernel(run, scratch=lambda eq: min(rows, piece) * columns * 4, library="oneDNN")


def in_float32(eq: Equation) -> Kernel | None:
    """A product of bfloat16 by ATen on copies in float32, where the CPU has no instructions for it: ATen's own code takes 25 times
    as long as for float32. None where it has, or for other types."""
    if has_bfloat16() or eq.op not in PRODUCTS or not _plain(eq.args, torch.bfloat16):
        return None

    def run(outputs: tuple, args: tuple, kwargs: dict) -> None:
        outputs[0].copy_(eq.op(*(t.float() for t in args), **kwargs))

    return Kernel(run, scratch=lambda eq: 4 * sum(v.fake.numel() for v in (*eq.args, eq.outputs)))


def product_operands(eq: Equation) -> tuple[Value, Value, Value | None]:
    """The factors of mm, bmm or addmm, and what is added."""
    return (*eq.args, None) if len(eq.args) == 2 else (eq.args[1], eq.args[2], eq.args[0])


def own(eq: Equation) -> Kernel | None:
    """The equation by our kernel, which takes any strides and writes into a given destination; None where it doesn't
    apply."""
    if eq.kwargs or not isinstance(eq.outputs, Value) or not _plain(eq.args, torch.float32, torch.bfloat16):
        return None
    if not matmul.available(eq.outputs.dtype):
        return None
    if eq.op in (aten.mm.default, aten.bmm.default):
        return Kernel(matmul.forward, scratch=_packed, takes_prologues=eq.op is aten.mm.default)
    if eq.op is aten.addmm.default and eq.args[0].shape == eq.outputs.shape[1:]:
        return Kernel(_with_bias, scratch=_packed, takes_prologues=True)
    return None


def _with_bias(outputs: tuple, args: tuple, kwargs: dict, prologues: matmul.Prologues = matmul.NONE) -> None:
    matmul.forward(outputs, (args[1], args[2], args[0]), kwargs, prologues=prologues)


def _packed(eq: Equation) -> int:
    a, _, _ = product_operands(eq)
    return matmul.scratch_bytes(tuple(eq.outputs.shape), a.shape[-1], eq.outputs.dtype)


def _plain(args: tuple, *dtypes: torch.dtype) -> bool:
    """Tensors on the CPU, all of one of these types, none of them empty?"""
    if not all(isinstance(v, Value) and v.device.type == "cpu" and v.fake.numel() for v in args):
        return False
    return args[0].dtype in dtypes and len({v.dtype for v in args}) == 1


def _dense(v: Value) -> bool:
    """Is `v`, a matrix, without gaps, by rows or by columns?"""
    rows, columns = v.shape
    return v.fake.is_contiguous() or v.strides[0] == 1 and (v.strides[1] == rows or columns == 1)


@dataclass
class Products:
    """The chosen `kernels`. `extra` and `copy`, for every product that our kernel serves: the seconds by which it is
    slower than the fastest, and what copying the result takes (of the part that was timed)."""

    kernels: dict[Equation, Kernel] = field(default_factory=dict)
    own: set[Equation] = field(default_factory=set)
    """Those by our kernel."""
    extra: dict[Equation, float] = field(default_factory=dict)
    copy: dict[Equation, float] = field(default_factory=dict)


def choose_products(equations: list[Equation]) -> Products:
    """For the products where another library, or a kernel of ours, is faster than the operator itself: those."""
    choices = Choices("products")
    timed = {key: entry for key, entry in choices.table.items() if "like" not in entry and "copy" in entry}
    found = Products()
    memory: dict[tuple, torch.Tensor] = {}
    for eq in equations:
        others = {"float32": in_float32(eq), "onednn": onednn(eq), "own": own(eq)}
        others = {name: kernel for name, kernel in others.items() if kernel is not None}
        if not others:
            continue
        candidates = {} if "float32" in others else {"aten": eq.op}
        candidates |= {name: partial(_into_new, kernel) for name, kernel in others.items()}
        layouts = ";".join(f"{tuple(v.shape)}{tuple(v.strides)}" for v in eq.args)
        key = f"{eq.name} {layouts} threads={torch.get_num_threads()} {isa()}"
        key += " bfloat16" if eq.outputs.dtype == torch.bfloat16 else ""
        measure = partial(_measured, candidates, eq.args, memory, key, timed)
        choice = choices.get(key, measure) if len(candidates) > 1 else next(iter(candidates))
        if choice in others:
            found.kernels[eq] = others[choice]
            found.own |= {eq} if choice == "own" else set()
        entry = choices.table.get(key, {})
        if "own" in others and "copy" in entry and "own" in entry["seconds"]:
            found.extra[eq] = entry["seconds"]["own"] - min(entry["seconds"].values())
            found.copy[eq] = entry["copy"]
    choices.save()
    return found


def _into_new(kernel: Kernel, *args: torch.Tensor) -> None:
    *_, a, b = args
    kernel.run((a.new_empty(*a.shape[:-1], b.shape[-1]),), args, {})


def _measured(
    candidates: dict[str, Callable], args: tuple[Value, ...], memory: dict[tuple, torch.Tensor], key: str, timed: dict[str, Any]
) -> dict[str, Any]:
    return _neighbour(timed, key) or _fastest(candidates, args, memory)


def _fastest(
    candidates: dict[str, Callable], args: tuple[Value, ...], memory: dict[tuple, torch.Tensor], enough: float = 0.05
) -> dict[str, Any]:
    """Best times in seconds, alternating: two to four rounds, until `enough` seconds have been spent (long products vary
    less); a candidate far behind is not tried again. And the time that copying the result takes. Both are the whole
    product's, where a part was timed."""
    built_ahead()
    keep_pages()
    tensors = _operands(args, memory)

    def seconds(call: Callable) -> float:
        start = time.perf_counter()
        call(*tensors)
        return time.perf_counter() - start

    began = time.perf_counter()
    best = {name: seconds(call) for name, call in candidates.items()}
    left = in_question(best, 3)  # some prepared themselves just now
    for _ in range(3):
        for name in left:
            best[name] = min(best[name], seconds(candidates[name]))
        left = in_question({name: best[name] for name in left}, 1.15)
        if len(left) == 1 or time.perf_counter() - began > enough:
            break
    *_, a, b = tensors
    result, copy = a.new_zeros(*a.shape[:-1], b.shape[-1]), []
    for _ in range(2):
        start = time.perf_counter()
        torch.empty_like(result).copy_(result)
        copy.append(time.perf_counter() - start)
    (rows, inner, columns), (m, k, n) = _sizes(*args[-2:]), _sizes(a, b)
    whole = {name: t * rows * inner * columns / (m * k * n) for name, t in best.items()}
    return {
        "choice": chosen(best), "seconds": whole, "copy": min(copy) * rows * columns / (m * n),
    }  # fmt: skip


def chosen(seconds: dict[str, float]) -> str:
    """Whose products are used, by what they take."""
    return in_question(seconds, 1)[0]


def in_question(seconds: dict[str, float], factor: float) -> list[str]:
    """Those that would be the choice if they took less time by that factor."""
    handicap = HANDICAP if "own" in seconds else {}
    counted = {name: t * handicap.get(name, 1) for name, t in seconds.items()}
    return [name for name, t in counted.items() if t <= factor * min(counted.values())]


def _neighbour(timed: dict[str, Any], key: str) -> dict[str, Any] | None:
    """An entry after that of the nearest product that differs in one length alone, the tokens of a batch mostly: timing
    every length again would take long, and where another choice came out, another epilogue would have to be built."""
    layouts, _, machine = key.partition(" threads=")
    form, numbers = _NUMBER.sub("", layouts), _NUMBER.findall(layouts)
    nearest, like = NEAR, None
    for other in timed:
        their_layouts, _, their_machine = other.partition(" threads=")
        if their_machine != machine or _NUMBER.sub("", their_layouts) != form:
            continue
        pairs = zip(numbers, _NUMBER.findall(their_layouts))
        ratios = {int(mine) / max(int(theirs), 1) for mine, theirs in pairs if mine != theirs}
        if len(ratios) == 1 and 0 not in ratios and max(ratio := ratios.pop(), 1 / ratio) <= nearest:
            nearest, like, by = max(ratio, 1 / ratio), other, ratio
    if like is None:
        return None
    entry = timed[like]
    seconds = {name: by * t for name, t in entry["seconds"].items()}
    return {"choice": entry["choice"], "seconds": seconds, "copy": by * entry["copy"], "like": like}


def _sizes(a: Value | torch.Tensor, b: Value | torch.Tensor) -> tuple[int, int, int]:
    return a.shape[-2], a.shape[-1], b.shape[-1]


def _operands(args: tuple[Value, ...], memory: dict[tuple, torch.Tensor]) -> list[torch.Tensor]:
    """Tensors laid out like the arguments in `memory`, by their type and position, which grows; no longer than LONGEST in any
    dimension. Ordinary numbers, not random ones: a run must not depend on whether the choice was cached."""
    tensors = []
    for n, v in enumerate(args):
        shape = [*v.shape[:-2], *(min(size, LONGEST) for size in v.shape[-2:])]
        strides = list(v.strides)
        if v.fake.dim() == 2 and _dense(v):  # so is the part
            strides = [shape[1], 1] if v.fake.is_contiguous() else [1, shape[0]]
        extent = 1 + sum((size - 1) * stride for size, stride in zip(shape, strides))
        at = v.dtype, n
        if at not in memory or memory[at].numel() < extent:
            memory[at] = torch.linspace(-1, 1, extent).to(v.dtype)
        tensors.append(memory[at].as_strided(shape, strides))
    return tensors
