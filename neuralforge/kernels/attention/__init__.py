"""Flash attention: softmax(q k^T scale) v in blocks, without the matrix of weights in memory, forward and backward.

Shapes: B batch, H heads of queries, G heads of keys and values (H a multiple of G: each serves H / G heads of
queries), T queries, S keys, K head width. The C code (any K) reads and writes any strides whose last is 1, so the parts of one [B, T, 3 H K] projection serve as they
are. It computes in float32; with bfloat16 in memory on a CPU that multiplies bfloat16, the products take the operands as
they are, and weights and their gradients rounded to bfloat16, and sum in float32.
"""

from __future__ import annotations

import ctypes
import math
from pathlib import Path

import torch

from ...errors import KernelError
from ..native import AMX, CELLS, TRANSPOSE, Native, long, wide
from ..random import PHILOX
from .dropout import threshold
from .reference import reference, reference_backward

_FILE, _BFLOAT16 = (Path(__file__).with_name(name) for name in ("attention.c", "bfloat16.h"))
_NATIVE = {
    torch.float32: Native(_FILE, PHILOX, TRANSPOSE),
    torch.bfloat16: Native(_FILE, PHILOX, TRANSPOSE, CELLS, AMX, _BFLOAT16, defines="#define BFLOAT16\n"),
}


@torch.library.custom_op("neuralforge::flash_attention", mutates_args=())
def flash_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    is_causal: bool = False,
    scale: float | None = None,
    window: int | None = None,
    mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    seed: torch.Tensor | None = None,
    q_starts: torch.Tensor | None = None,
    k_starts: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of queries [B, H, T, K] on keys and values [B, G, S, K].

    `is_causal`: query t sees the keys 0 to t, as in PyTorch also where T and S differ. `window`: it sees keys less than
    `window` away. `mask`: bool (true: is seen) or float (added to the scores), broadcast to [B, H, T, S]; it has no
    gradient. `scale`: 1 / sqrt(K) if None. `dropout_p`: each weight is zero with this probability, else divided by
    1 - dropout_p; `seed`, int64 [2], is a seed and an offset below 2^32: the same two draw the same weights, on every
    machine. `q_starts` and `k_starts`, int64 [n + 1]: n sequences of any lengths are packed one after the other in a batch of
    one, from 0 = starts[0] to starts[n] = T or S; a query sees keys of its own sequence only, whose places, for `is_causal` and
    `window`, count from its start. (Elsewhere `cu_seqlens`: q [T, H, K] is packed as q.transpose(0, 1)[None].)

    Returns the output [B, H, T, K], laid out as [B, T, H, K], and the log-sum-exp of each query's scores [B, H, T], at least
    float32.
    A query that sees nothing gets 0 and -inf. Raises KernelError where shapes don't fit.
    """
    check(q, k, v, window, mask, dropout_p, seed, q_starts, k_starts)
    options = is_causal, scale, window, mask, dropout_p, seed
    if not native(q, k, v, mask):
        check_starts(q, k, q_starts, k_starts)
        out, lse = reference(q, k, v, *options, q_starts, k_starts)
        return _as_BTHK(out), lse.contiguous()
    outputs = _empty_BTHK(q), _empty_lse(q)
    forward(outputs, (q, k, v, *options, q_starts, k_starts), {})
    return outputs


@torch.library.custom_op("neuralforge::flash_attention_backward", mutates_args=())
def flash_attention_backward(
    g: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    is_causal: bool = False,
    scale: float | None = None,
    window: int | None = None,
    mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    seed: torch.Tensor | None = None,
    g_lse: torch.Tensor | None = None,
    q_starts: torch.Tensor | None = None,
    k_starts: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of q, k and v, laid out as [B, T, H, K], given those of flash_attention's results, `g` [B, H, T, K]
    and `g_lse` [B, H, T] (None: zero)."""
    options = is_causal, scale, window, mask, dropout_p, seed, g_lse, q_starts, k_starts
    if not native(q, k, v, mask):
        return tuple(map(_as_BTHK, reference_backward(g, q, k, v, out, lse, *options)))
    outputs = _empty_BTHK(q), _empty_BTHK(k), _empty_BTHK(v)
    backward(outputs, (g, q, k, v, out, lse, *options), {})
    return outputs


@flash_attention.register_fake
def _(q, k, v, is_causal=False, scale=None, window=None, mask=None, dropout_p=0.0, seed=None, q_starts=None, k_starts=None):
    check(q, k, v, window, mask, dropout_p, seed, q_starts, k_starts)
    return _empty_BTHK(q), _empty_lse(q)


@flash_attention_backward.register_fake
def _(
    g, q, k, v, out, lse,
    is_causal=False, scale=None, window=None, mask=None, dropout_p=0.0, seed=None, g_lse=None, q_starts=None, k_starts=None,
):  # fmt: skip
    return _empty_BTHK(q), _empty_BTHK(k), _empty_BTHK(v)


def _setup(ctx, inputs, output):
    *qkv, ctx.is_causal, ctx.scale, ctx.window, mask, ctx.dropout_p, seed, q_starts, k_starts = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*qkv, *output, mask, seed, q_starts, k_starts)


def _torch_backward(ctx, g, g_lse):
    q, k, v, out, lse, mask, seed, q_starts, k_starts = ctx.saved_tensors
    if g is None and g_lse is None:
        return (None,) * 11
    g = torch.zeros_like(out) if g is None else g
    options = ctx.is_causal, ctx.scale, ctx.window, mask, ctx.dropout_p, seed, g_lse, q_starts, k_starts
    return *flash_attention_backward(g, q, k, v, out, lse, *options), *[None] * 8


flash_attention.register_autograd(_torch_backward, setup_context=_setup)


def _empty_BTHK(x: torch.Tensor) -> torch.Tensor:
    B, H, T, K = x.shape
    return x.new_empty(B, T, H, K).transpose(1, 2)


def _empty_lse(q: torch.Tensor) -> torch.Tensor:
    return q.new_empty(q.shape[:3], dtype=wide(q.dtype))


def _as_BTHK(x: torch.Tensor) -> torch.Tensor:
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def check(q, k, v, window, mask, dropout_p, seed, q_starts=None, k_starts=None) -> None:
    """Raises KernelError where the shapes don't fit together."""
    shapes = f"q {list(q.shape)}, k {list(k.shape)}, v {list(v.shape)}"
    if not q.dim() == k.dim() == v.dim() == 4 or k.shape != v.shape or q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
        raise KernelError(f"flash attention: {shapes}; expected [B, H, T, K], and [B, G, S, K] twice.")
    if k.shape[1] == 0 and q.shape[1] or k.shape[1] and q.shape[1] % k.shape[1]:
        raise KernelError(f"flash attention: {shapes}; the heads of q must be a multiple of those of k and v.")
    if window is not None and window < 1:
        raise KernelError(f"flash attention: window={window}; expected 1 (a query sees its own key only) or more, or None.")
    if not 0 <= dropout_p < 1 or (seed is None) != (dropout_p == 0):
        raise KernelError(
            f"flash attention: dropout_p={dropout_p} with{'out' if seed is None else ''} a seed; expected 0 without one, or "
            f"0 < dropout_p < 1 with one."
        )
    if seed is not None and (seed.shape != (2,) or seed.dtype != torch.int64):
        raise KernelError(f"flash attention: seed {seed.dtype} {list(seed.shape)}; expected int64 [2], seed and offset.")
    if mask is not None:
        wanted = (*q.shape[:3], k.shape[2])
        try:
            fits = torch.broadcast_shapes(mask.shape, wanted) == wanted
        except RuntimeError:
            fits = False
        if not fits:
            raise KernelError(f"flash attention: mask {list(mask.shape)}; expected what broadcasts to {list(wanted)}.")
    starts = [s for s in (q_starts, k_starts) if s is not None]
    if not starts:
        return
    fit = len(starts) == 2 and all(s.dtype == torch.int64 and s.dim() == 1 for s in starts) and len(q_starts) == len(k_starts) > 0
    if not fit or q.shape[0] != 1 or mask is not None:
        found = " and ".join(f"{s.dtype} {list(s.shape)}" for s in starts)
        raise KernelError(
            f"flash attention: sequences that start at {found}, {shapes}{'' if mask is None else ', a mask'}; expected q_starts and "
            f"k_starts, int64 [n + 1] both, a batch of 1, and no mask."
        )


def check_starts(q, k, q_starts, k_starts) -> None:
    """Raises KernelError where the numbers in these don't ascend from 0 to the number of tokens."""
    for name, starts, x in (("q_starts", q_starts, q), ("k_starts", k_starts, k)):
        numbers = [] if starts is None else starts.tolist()
        if numbers and (numbers[0] != 0 or numbers[-1] != x.shape[2] or sorted(numbers) != numbers):
            raise KernelError(f"flash attention: {name} {numbers}; expected numbers that ascend from 0 to {x.shape[2]}.")


def available(dtype: torch.dtype = torch.float32) -> bool:
    """Is there C code for this type that can be built on this machine?"""
    return dtype in _NATIVE and _NATIVE[dtype].available()


def native(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None = None) -> bool:
    """Does the C code serve these operands?"""
    fits = all(x.dtype == q.dtype and x.device.type == "cpu" and x.numel() > 0 for x in (q, k, v))
    mask_fits = mask is None or mask.dtype in (torch.bool, torch.float32, q.dtype)
    return fits and mask_fits and available(q.dtype)


class _Tensor(ctypes.Structure):
    """Address, and strides of batch, head and time."""

    _fields_ = [("at", ctypes.c_void_p), ("b", long), ("h", long), ("t", long)]


class _Shape(ctypes.Structure):
    _fields_ = [(name, long) for name in ("B", "H", "G", "T", "S", "K", "left", "right")]
    _fields_ += [("mask", _Tensor), ("mask_s", long)]
    _fields_ += [("sequences", long), ("q_starts", ctypes.c_void_p), ("k_starts", ctypes.c_void_p), ("q0", long), ("k0", long)]
    _fields_ += [("seed", ctypes.c_void_p)]
    _fields_ += [("ahead", ctypes.c_void_p)]  # its own
    _fields_ += [("scale", ctypes.c_float), ("kept", ctypes.c_float), ("threshold", ctypes.c_uint)]


class _Arrays(ctypes.Structure):
    _fields_ = [(name, _Tensor) for name in ("q", "k", "v", "out", "lse", "g", "g_lse", "dq", "dk", "dv")]


def _shape(q, k, is_causal, scale, window, mask, dropout_p, seed, q_starts, k_starts) -> tuple[_Shape, tuple]:
    """The description for the C code, and the tensors that it points into."""
    (B, H, T, K), (G, S) = q.shape, k.shape[1:3]
    reach = T + S if window is None else min(window - 1, T + S)
    shape = _Shape(B, H, G, T, S, K, reach, 0 if is_causal else reach)
    shape.scale = 1 / math.sqrt(K) if scale is None else scale
    if mask is not None:
        if mask.dtype == torch.bool:
            mask = torch.zeros(mask.shape).masked_fill_(~mask, -math.inf)
        mask = mask.float().expand(B, H, T, S)
        shape.mask, shape.mask_s = _describe(mask), mask.stride(3)
    if seed is not None:
        seed = seed.contiguous()
        shape.seed, shape.kept, shape.threshold = seed.data_ptr(), 1 / (1 - dropout_p), threshold(dropout_p)
    if q_starts is not None:
        check_starts(q, k, q_starts, k_starts)
        q_starts, k_starts = q_starts.contiguous(), k_starts.contiguous()
        shape.q_starts, shape.k_starts, shape.sequences = q_starts.data_ptr(), k_starts.data_ptr(), len(q_starts) - 1
        shape.T, shape.S = (int(s.diff().max()) for s in (q_starts, k_starts))
    return shape, (mask, seed, q_starts, k_starts)


def _describe(x: torch.Tensor | None) -> _Tensor:
    return _Tensor() if x is None else _Tensor(x.data_ptr(), *x.stride()[:3])


def _rows(x: torch.Tensor) -> torch.Tensor:
    """Itself, or a copy, if the numbers of a head don't lie side by side."""
    return x if x.stride(3) == 1 or x.shape[3] == 1 else x.contiguous()


def forward(outputs: tuple, args: tuple, kwargs: dict) -> None:
    """The C code into preallocated outputs: out [B, H, T, K] (last stride 1) and the log-sum-exp [B, H, T]."""
    _forward(*outputs, *args, **kwargs)


def _forward(
    out, lse, q, k, v, is_causal=False, scale=None, window=None, mask=None, dropout_p=0.0, seed=None, q_starts=None, k_starts=None
):
    shape, _kept = _shape(q, k, is_causal, scale, window, mask, dropout_p, seed, q_starts, k_starts)
    q, k, v = map(_rows, (q, k, v))
    arrays = _Arrays(*map(_describe, (q, k, v, out, lse)))
    _memory(_NATIVE[q.dtype].library.attention_forward(ctypes.byref(shape), ctypes.byref(arrays)))


def backward(outputs: tuple, args: tuple, kwargs: dict) -> None:
    """The C code into preallocated gradients of q, k and v (last stride 1)."""
    _backward(*outputs, *args, **kwargs)


def _backward(
    dq, dk, dv, g, q, k, v, out, lse,
    is_causal=False, scale=None, window=None, mask=None, dropout_p=0.0, seed=None, g_lse=None, q_starts=None, k_starts=None,
):  # fmt: skip
    shape, _kept = _shape(q, k, is_causal, scale, window, mask, dropout_p, seed, q_starts, k_starts)
    g, q, k, v, out = (_rows(x.to(q.dtype)) for x in (g, q, k, v, out))
    arrays = _Arrays(*map(_describe, (q, k, v, out, lse, g, g_lse, dq, dk, dv)))
    _memory(_NATIVE[q.dtype].library.attention_backward(ctypes.byref(shape), ctypes.byref(arrays)))


def _memory(failed: int) -> None:
    if failed:
        raise MemoryError("flash attention: no memory for its blocks")
