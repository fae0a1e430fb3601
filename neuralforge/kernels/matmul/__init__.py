"""Matrix product with bias: blocks packed for the caches, sums in registers, threads by tiles.

In float32 and bfloat16: products summed in float32, and the result rounded once. Where the CPU doesn't multiply bfloat16 faster,
its numbers are widened as they are packed. On Intel's tiles (AMX) float32 is made of three terms of bfloat16, no less accurately
than by multiply-adds (`tiles.h`); `NEURALFORGE_ISA=avx512` keeps to these. (There, and in products of bfloat16 by instructions of
its own, what is below the normal numbers counts as zero.) Operands may have any strides, so that transposes cost nothing;
`forward` writes into any matrix whose rows or columns are contiguous. NaN and infinities go through as in torch.mm.
"""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path

import torch

from ...errors import KernelError
from ..native import AMX, CELLS, TRANSPOSE, Native, long, pointer

_FILE, *_HEADERS = (Path(__file__).with_name(name) for name in ("matmul.c", "vectors.h", "tiles.h"))
_HEADERS = (TRANSPOSE, CELLS, AMX, *_HEADERS)
_NATIVE = {
    torch.float32: Native(_FILE, *_HEADERS),
    torch.bfloat16: Native(_FILE, *_HEADERS, defines="#define BFLOAT16\n"),
}


@torch.library.custom_op("neuralforge::matmul", mutates_args=())
def matmul(a: torch.Tensor, b: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """a b + bias: `a` [M, K] and `b` [K, N], or [B, M, K] and [B, K, N]; `bias` [N].

    Returns [M, N] or [B, M, N], contiguous. Raises KernelError where shapes or types don't fit together.
    """
    check(a, b, bias)
    if not native(a, b, bias):
        return reference(a, b, bias).contiguous()
    out = _empty(a, b)
    forward((out,), (a, b, bias), {})
    return out


@matmul.register_fake
def _(a, b, bias=None):
    check(a, b, bias)
    return _empty(a, b)


def _empty(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return a.new_empty(*a.shape[:-1], b.shape[-1])


def _setup(ctx, inputs, output):
    a, b, bias = inputs
    ctx.has_bias = bias is not None
    ctx.save_for_backward(a, b)


def _torch_backward(ctx, g):
    a, b = ctx.saved_tensors
    wanted = ctx.needs_input_grad
    da = matmul(g, b.mT) if wanted[0] else None
    db = matmul(a.mT, g) if wanted[1] else None
    return da, db, g.flatten(0, -2).sum(0) if ctx.has_bias and wanted[2] else None


matmul.register_autograd(_torch_backward, setup_context=_setup)


def reference(a, b, bias=None):
    """The truth, in plain operators."""
    product = a @ b
    return product if bias is None else product + bias


def check(a: torch.Tensor, b: torch.Tensor, bias: torch.Tensor | None) -> None:
    """Raises KernelError where the operands don't fit together."""
    fit = a.dim() == b.dim() and a.dim() in (2, 3) and a.shape[-1] == b.shape[-2] and a.shape[:-2] == b.shape[:-2]
    if not fit or bias is not None and bias.shape != b.shape[-1:]:
        shapes = f"a {list(a.shape)}, b {list(b.shape)}" + ("" if bias is None else f", bias {list(bias.shape)}")
        raise KernelError(f"matmul: {shapes}; expected [M, K], [K, N] and perhaps [N], or [B, M, K], [B, K, N] and [N].")
    types = {t.dtype for t in (a, b, bias) if t is not None}
    if len(types) > 1:
        raise KernelError(f"matmul: operands of {' and '.join(map(str, types))}; expected one type. Convert one with .to().")


def available(dtype: torch.dtype = torch.float32) -> bool:
    """Has this machine C code for matrices of `dtype`?"""
    return dtype in _NATIVE and _NATIVE[dtype].available()


def native(*operands: torch.Tensor | None) -> bool:
    """Does the C code serve these operands?"""
    given = [t for t in operands if t is not None]
    return all(t.dtype == given[0].dtype and t.device.type == "cpu" for t in given) and available(given[0].dtype)


class Prologue(ctypes.Structure):
    """What makes an operand, a matrix that is contiguous or the transpose of one, as it is packed: C code of `prologue_source`
    (`compiler/fusion/codegen.py`), and what it takes; an address `ahead` of which memory of as many numbers of `size` bytes is read."""

    _fields_ = [("make", ctypes.c_void_p), ("pointers", ctypes.c_void_p), ("sizes", ctypes.c_void_p), ("ahead", ctypes.c_void_p), ("size", long)]


Prologues = tuple[Prologue | None, Prologue | None]
"""Of both factors."""
NONE: Prologues = (None, None)


def forward(
    outputs: tuple, args: tuple, kwargs: dict, add: bool = False, sums: torch.Tensor | None = None, prologues: Prologues = NONE
) -> None:
    """The C code into a preallocated output [M, N] or [B, M, N] of any strides; or `add` to it, without a bias. `sums` of the
    rows of `a`, float32 [M]: of matrices, into an output that is contiguous along its rows. An operand that has a prologue
    tells shape and strides only."""
    (a, b, bias), (out,) = (*args, None)[:3], outputs
    if out.stride(-1) != 1 and out.shape[-1] > 1 and (out.stride(-2) == 1 and bias is None):
        a, b, out, prologues = b.mT, a.mT, out.mT, prologues[::-1]  # (A B)^T = B^T A^T
    direct = (out.stride(-1) == 1 or out.shape[-1] <= 1) and not (add and out.dtype == torch.bfloat16)
    c = out if direct else torch.empty(out.shape, dtype=out.dtype)
    bias = bias if bias is None else bias.contiguous()
    numbers = layout(a, b, c, add and direct)
    made = [p and ctypes.addressof(p) for p in prologues]
    entry(a.dtype)(pointer(a), pointer(b), pointer(bias), pointer(c), numbers, None, None, pointer(sums), *made)
    if not direct:
        out.add_(c) if add else out.copy_(c)


def layout(a: torch.Tensor, b: torch.Tensor, c: torch.Tensor | None, add: bool = False) -> ctypes.Array:
    """Sizes and strides as the C code takes them; without `c`, which an epilogue doesn't need, zeros for it."""
    batch = (lambda t: t.stride(0)) if a.dim() == 3 else (lambda t: 0)
    sizes = [a.shape[0] if a.dim() == 3 else 1, a.shape[-2], b.shape[-1], a.shape[-1]]
    strides = [batch(a), a.stride(-2), a.stride(-1), batch(b), b.stride(-2), b.stride(-1)]
    return (ctypes.c_long * 13)(*sizes, *strides, *((0, 0) if c is None else (batch(c), c.stride(-2))), add)


def entry(dtype: torch.dtype) -> ctypes._CFuncPtr:
    """The C function. Raises KernelError as the toolchain does."""
    return _declared(_NATIVE[dtype].library).matmul


@cache
def _declared(library: ctypes.CDLL) -> ctypes.CDLL:
    library.matmul.argtypes, library.matmul.restype = [ctypes.c_void_p] * 10, None
    library.matmul_blocks.argtypes, library.matmul_blocks.restype = [long], long
    library.matmul_columns.restype = long
    library.matmul_scratch.argtypes, library.matmul_scratch.restype = [long] * 6, long
    library.matmul_flat.argtypes, library.matmul_flat.restype = [long] * 4, long
    return library


def blocks(rows: int, dtype: torch.dtype) -> int:
    """In how many blocks of rows tiles come."""
    return _declared(_NATIVE[dtype].library).matmul_blocks(rows)


def scratch_bytes(shape: tuple[int, ...], K: int, dtype: torch.dtype, epilogue: bool = False, sums: bool = False) -> int:
    """What a product of that `shape`, of K numbers each, allocates for a while; with an epilogue, or sums of rows."""
    batch = shape[0] if len(shape) == 3 else 1
    return _declared(_NATIVE[dtype].library).matmul_scratch(batch, *shape[-2:], K, epilogue, sums)


def times_packed(M: int, N: int, dtype: torch.dtype, epilogue: bool = False, sums: bool = False) -> tuple[int, int]:
    """How often the numbers of the left and of the right factor are packed, and so made by a prologue."""
    flat, columns = _declared(_NATIVE[dtype].library).matmul_flat(M, N, epilogue, sums), most_columns(dtype)
    return (1, -(-M // columns)) if flat else (-(-N // columns), 1)


def most_columns(dtype: torch.dtype) -> int:
    """Products with no more columns have tiles of whole rows."""
    return _declared(_NATIVE[dtype].library).matmul_columns()
