"""Rows of a table by number, with a gradient that writes each number of the table's once, whatever reads it.

Shapes: V rows of D numbers; tokens of any shape, N in all.
"""

from __future__ import annotations

from pathlib import Path

import torch

from ...errors import KernelError
from ..native import Native, long, pointer

_FILE = Path(__file__).with_name("embedding.c")
_NATIVE = {torch.float32: Native(_FILE), torch.bfloat16: Native(_FILE, defines="#define BFLOAT16\n")}


@torch.library.custom_op("neuralforge::embedding", mutates_args=())
def embedding(weight: torch.Tensor, index: torch.Tensor, padding_idx: int = -1, scale_grad_by_freq: bool = False) -> torch.Tensor:
    """The rows of `weight` [V, D] that `index`, int64 or int32 of any shape, names: [*index.shape, D]. The row
    `padding_idx` has a gradient of 0; with `scale_grad_by_freq` a row's is divided by how often it is read."""
    return torch.nn.functional.embedding(index, weight)


@torch.library.custom_op("neuralforge::embedding_backward", mutates_args=())
def embedding_backward(
    g: torch.Tensor, index: torch.Tensor, rows: int, padding_idx: int = -1, scale_grad_by_freq: bool = False
) -> torch.Tensor:
    """The gradient of the table [rows, D], given that of what was read, `g` [*index.shape, D]. bfloat16 is added up in
    float32; the sums are the same for any number of threads. Raises KernelError for an index out of range and for
    shapes that don't fit."""
    if g.shape[:-1] != index.shape or g.dim() == 0:
        raise KernelError(
            f"embedding gradient: g {list(g.shape)} and index {list(index.shape)}; expected g [*index.shape, D]."
        )
    out = g.new_empty(rows, g.shape[-1])
    if native(g, out):
        backward((out,), (g, index, rows, padding_idx, scale_grad_by_freq), {})
        return out
    return reference(g, index, rows, padding_idx, scale_grad_by_freq)


@embedding.register_fake
def _(weight, index, padding_idx=-1, scale_grad_by_freq=False):
    return weight.new_empty(*index.shape, weight.shape[1])


@embedding_backward.register_fake
def _(g, index, rows, padding_idx=-1, scale_grad_by_freq=False):
    return g.new_empty(rows, g.shape[-1])


def _setup(ctx, inputs, output):
    weight, index, ctx.padding_idx, ctx.scale_grad_by_freq = inputs
    ctx.rows = weight.shape[0]
    ctx.save_for_backward(index)


def _torch_backward(ctx, g):
    (index,) = ctx.saved_tensors
    return embedding_backward(g, index, ctx.rows, ctx.padding_idx, ctx.scale_grad_by_freq), None, None, None


embedding.register_autograd(_torch_backward, setup_context=_setup)


def _setup_backward(ctx, inputs, output):
    _, index, _, ctx.padding_idx, ctx.scale_grad_by_freq = inputs
    ctx.save_for_backward(index)


def _torch_backward_of_backward(ctx, table):
    (index,) = ctx.saved_tensors
    return reference_transposed(table, index, ctx.padding_idx, ctx.scale_grad_by_freq), None, None, None, None


embedding_backward.register_autograd(_torch_backward_of_backward, setup_context=_setup_backward)


def reference(g, index, rows, padding_idx=-1, scale_grad_by_freq=False):
    """The truth, in plain operators."""
    dtype, index, D = g.dtype, index.flatten().long(), g.shape[-1]
    wide = torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype
    g = g.reshape(len(index), D).to(wide) * _share(index, rows, padding_idx, scale_grad_by_freq).to(wide)
    return g.new_zeros(rows, D).index_add(0, index, g).to(dtype)


def reference_transposed(table, index, padding_idx=-1, scale_grad_by_freq=False):
    """The gradient of `g`, given that of the table's gradient, [rows, D]: both are linear."""
    share = _share(index.flatten().long(), table.shape[0], padding_idx, scale_grad_by_freq)
    return embedding(table, index) * share.to(table.dtype).view(*index.shape, 1)


def _share(index, rows, padding_idx, scale_grad_by_freq):
    """By what a token's gradient is multiplied on its way into the table, [N, 1]."""
    share = (index != padding_idx).double()
    if scale_grad_by_freq:
        share = share / torch.zeros(rows, dtype=share.dtype, device=index.device).index_add(0, index, torch.ones_like(share))[index]
    return share.unsqueeze(1)


def native(g: torch.Tensor, out: torch.Tensor) -> bool:
    """Does the C code serve this gradient, to be written to `out`?"""
    fits = g.dtype == out.dtype and g.dtype in _NATIVE and g.device.type == "cpu" and out.is_contiguous() and out.numel() > 0
    return fits and _NATIVE[g.dtype].available()


def backward(outputs: tuple, args: tuple, kwargs: dict) -> None:
    """The C code into a preallocated output; arguments as aten.embedding_dense_backward's. Raises KernelError for an index
    out of range."""
    g, index, rows, padding_idx, scale_grad_by_freq = args
    D = g.shape[-1]
    g, index = g.reshape(index.numel(), D), index.reshape(-1).long().contiguous()
    if D > 1 and g.stride(1) != 1 or g.stride(0) < 0:
        g = g.contiguous()
    library = _NATIVE[g.dtype].library
    library.embedding_backward.restype = long
    bad = library.embedding_backward(
        pointer(g), long(g.stride(0)), pointer(index), pointer(outputs[0]), long(index.numel()), long(rows), long(D),
        long(padding_idx), long(scale_grad_by_freq),
    )  # fmt: skip
    if bad == -2:
        raise MemoryError(f"embedding gradient: no memory to sort {index.numel()} tokens")
    if bad >= 0:
        raise KernelError(
            f"embedding gradient: index {int(index[bad])}, the {bad}th; expected 0 to {rows - 1}. Does the table have a row "
            f"for all tokens of the data?"
        )
