"""Rotary positions (Su et al. 2021, https://arxiv.org/abs/2104.09864): pairs of numbers turned by an angle that grows with the
position, in one pass. The gradient is the transposed rotation, by the same code.

Shapes: x [..., T, K] of T positions and heads of width K; tables of cosines and sines [T, K], or [T, K / 2] where both numbers
of a pair share them, or of any shape that broadcasts to x's.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import torch

from ...errors import KernelError
from ..native import Native, long, pointer, wide

_FILE = Path(__file__).with_name("rotary.c")
_NATIVE = {
    (torch.float32, torch.float32): Native(_FILE),
    (torch.bfloat16, torch.float32): Native(_FILE, defines="#define BFLOAT16\n"),
    (torch.bfloat16, torch.bfloat16): Native(_FILE, defines="#define BFLOAT16\n#define BFLOAT16_TABLES\n"),
}
"""By the types of x and of the tables."""


@torch.library.custom_op("neuralforge::rotary", mutates_args=())
def rotary(
    x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, transposed: bool = False, interleaved: bool = False
) -> torch.Tensor:
    """`x` [..., T, K] with each pair of numbers (a, b), i and i + K / 2, or 2 i and 2 i + 1 if `interleaved`, made
    (a cos - b sin, b cos + a sin), each with its own entry of the tables; `transposed` is the transpose of that as a matrix,
    the rotation back. Computed in float32 at least, rounded once, to x's dtype. Raises KernelError for an odd K and for
    tables that don't fit."""
    out = _like(x, cos, sin)
    if native(x, cos, sin, out):
        forward((out,), (x, cos, sin, transposed, interleaved), {})
        return out
    return out.copy_(reference(x, cos, sin, transposed, interleaved))


@rotary.register_fake
def _(x, cos, sin, transposed=False, interleaved=False):
    return _like(x, cos, sin)


def _like(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """What the result is written to: laid out like x, its last stride 1 if x's is. Raises KernelError for shapes that don't
    fit."""
    tables = [(t.shape[:-1], t.shape[-1]) if t.dim() else ((), 1) for t in (cos, sin)]
    K = x.shape[-1] if x.dim() else 1
    widths = tables[0][1] == tables[1][1] and tables[0][1] in (K, K // 2)
    if K % 2 or not widths or not all(_broadcasts(rows, x.shape[:-1]) for rows, _ in tables):
        raise KernelError(
            f"rotary: x {list(x.shape)}, cos {list(cos.shape)}, sin {list(sin.shape)}; expected x [..., T, K] with an even K, "
            f"and both tables [T, K], [T, K / 2] or what broadcasts like them."
        )
    return torch.empty_like(x, memory_format=torch.preserve_format if x.stride(-1) == 1 else torch.contiguous_format)


def _broadcasts(shape: torch.Size, to: torch.Size) -> bool:
    return len(shape) <= len(to) and all(n in (1, m) for n, m in zip(reversed(shape), reversed(to)))


def _setup(ctx, inputs, output):
    x, cos, sin, ctx.transposed, ctx.interleaved = inputs
    ctx.save_for_backward(x if any(ctx.needs_input_grad[1:3]) else None, cos, sin)


def _torch_backward(ctx, g):
    x, cos, sin = ctx.saved_tensors
    needs = ctx.needs_input_grad
    dx = rotary(g, cos, sin, not ctx.transposed, ctx.interleaved) if needs[0] else None
    dcos = gradient_of_cos(g, x, cos, ctx.interleaved).sum_to_size(cos.shape).to(cos.dtype) if needs[1] else None
    dsin = gradient_of_sin(g, x, sin, ctx.transposed, ctx.interleaved).sum_to_size(sin.shape).to(sin.dtype) if needs[2] else None
    return dx, dcos, dsin, None, None


rotary.register_autograd(_torch_backward, setup_context=_setup)


@rotary.register_vmap
def _(info, in_dims, x, cos, sin, transposed=False, interleaved=False):
    N = info.batch_size
    x = x.expand(N, *x.shape) if in_dims[0] is None else x.movedim(in_dims[0], 0)

    def table(t, d):
        t = t if d is None else t.movedim(d, 0)
        return t if d is None else t.reshape(N, *[1] * (x.dim() - t.dim()), *t.shape[1:])

    return rotary(x, table(cos, in_dims[1]), table(sin, in_dims[2]), transposed, interleaved), 0


def reference(x, cos, sin, transposed=False, interleaved=False):
    """The truth, in plain operators."""
    a, b = _pairs(_wide(x), interleaved)
    (cos1, cos2), (sin1, sin2) = (
        _pairs(t, interleaved) if t.shape[-1] == x.shape[-1] else (t, t) for t in (cos, sin)
    )
    if transposed:
        return _joined(a * cos1 + b * sin2, b * cos2 - a * sin1, interleaved).to(x.dtype)
    return _joined(a * cos1 - b * sin1, b * cos2 + a * sin2, interleaved).to(x.dtype)


def gradient_of_cos(g, x, cos, interleaved=False):
    """Given that of the result, at least float32; still to be summed where the table was broadcast."""
    return _folded(_wide(g) * x, cos, interleaved)


def gradient_of_sin(g, x, sin, transposed=False, interleaved=False):
    """As that of cos."""
    (a, b), (p, q) = (_pairs(_wide(t), interleaved) for t in ((g, x) if transposed else (x, g)))
    return _folded(_joined(-b * p, a * q, interleaved), sin, interleaved)


def _wide(x: torch.Tensor) -> torch.Tensor:
    return x.to(wide(x.dtype))


def _pairs(x: torch.Tensor, interleaved: bool) -> tuple[torch.Tensor, ...]:
    """The first and the second number of each pair."""
    return (x[..., ::2], x[..., 1::2]) if interleaved else x.chunk(2, -1)


def _joined(a: torch.Tensor, b: torch.Tensor, interleaved: bool) -> torch.Tensor:
    """Numbers of which these are the pairs."""
    return torch.stack([a, b], -1).flatten(-2) if interleaved else torch.cat([a, b], -1)


def _folded(entries: torch.Tensor, table: torch.Tensor, interleaved: bool) -> torch.Tensor:
    """The gradient of a table of which both numbers of a pair may share an entry."""
    return entries if table.shape[-1] == entries.shape[-1] else torch.add(*_pairs(entries, interleaved))


def available(x: torch.dtype = torch.float32, tables: torch.dtype = torch.float32) -> bool:
    """Is there C code for these types that can be built on this machine?"""
    return (x, tables) in _NATIVE and _NATIVE[x, tables].available()


def native(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, out: torch.Tensor) -> bool:
    """Does the C code serve these operands, writing to `out`?"""
    fits = sin.dtype == cos.dtype and all(t.device.type == "cpu" for t in (x, cos, sin))
    return fits and x.dim() <= 4 and out.numel() > 0 and out.stride(-1) == 1 and available(x.dtype, cos.dtype)


def forward(outputs: tuple, args: tuple, kwargs: dict) -> None:
    """The C code into a preallocated output, which may be the memory of an operand of its shape and strides."""
    x, cos, sin, transposed, interleaved = (*args, False, False)[:5]
    (out,), K = outputs, x.shape[-1]
    x, cos, sin = (t if t.stride(-1) == 1 else t.contiguous() for t in (x, cos, sin))
    tensors = x, cos, sin, out
    geometry = _geometry(*((tuple(t.shape), t.stride()) for t in tensors))
    apart, shared = 1 if interleaved else K // 2, cos.shape[-1] < K
    library = _NATIVE[x.dtype, cos.dtype].library
    library.rotary(*map(pointer, tensors), *geometry, *map(long, (K // 2, apart, shared, transposed)))


@lru_cache(256)
def _geometry(*layouts: tuple[tuple[int, ...], tuple[int, ...]]) -> list:
    """How many rows there are along three dimensions, and the strides of each operand and of the output, last, along them: in
    the order of the output's memory, with dimensions of 1 innermost, as threads share the outer two."""
    shape, along = layouts[-1]
    n = len(shape) - 1
    order = sorted(range(n), key=lambda d: (shape[d] == 1, -along[d]))
    three = lambda values, rest: (long * 3)(*(values[d] for d in order), *[rest] * (3 - n))

    def strides(sizes: tuple[int, ...], strides: tuple[int, ...]) -> list[int]:
        repeated = [0 if size == 1 else stride for size, stride in zip(sizes[:-1], strides)]
        return [0] * (n - len(repeated)) + repeated

    return [three(shape, 1), *(three(strides(*layout), 0) for layout in layouts)]
