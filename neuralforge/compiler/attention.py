"""Attention equations, PyTorch's and ours, by our kernel: written straight where the plan wants them."""

from __future__ import annotations

from collections.abc import Callable

import torch

from ..graph.ir import Equation, Value, map_tree
from ..kernels import attention

aten, own = torch.ops.aten, torch.ops.neuralforge


def claim_attention(eq: Equation) -> Callable[[tuple, tuple, dict], None] | None:
    """What writes the results of an attention equation into given outputs; None where it isn't one, or one that the
    kernel doesn't serve: with dropout, or other than float32 on a CPU."""
    if eq.op not in _KERNELS:
        return None
    write, arguments, first = _KERNELS[eq.op]
    args, kwargs = map_tree(lambda leaf: leaf.fake if isinstance(leaf, Value) else leaf, (eq.args, eq.kwargs))
    args, dropout_p = arguments(*args, **kwargs)
    rows = all(v.strides[-1] == 1 for v in eq.results if v.fake.dim() == 4)
    if dropout_p or not rows or not attention.native(*args[first : first + 3], mask=args[9 if first else 6]):
        return None
    return lambda outputs, args, kwargs: write(outputs, arguments(*args, **kwargs)[0], {})


def _aten_forward(q, k, v, dropout_p=0.0, is_causal=False, *, attn_mask=None, scale=None):
    return (q, k, v, is_causal, scale, None, attn_mask), dropout_p


def _aten_backward(g, q, k, v, out, lse, dropout_p, is_causal, *, attn_mask=None, scale=None):
    return (g, q, k, v, out, lse, is_causal, scale, None, attn_mask), dropout_p


def _own_forward(
    q, k, v, is_causal=False, scale=None, window=None, mask=None, dropout_p=0.0, seed=None, q_starts=None, k_starts=None
):
    return (q, k, v, is_causal, scale, window, mask, dropout_p, seed, q_starts, k_starts), 0.0


def _own_backward(
    g, q, k, v, out, lse,
    is_causal=False, scale=None, window=None, mask=None, dropout_p=0.0, seed=None, g_lse=None, q_starts=None, k_starts=None,
):  # fmt: skip
    options = is_causal, scale, window, mask, dropout_p, seed, g_lse, q_starts, k_starts
    return (g, q, k, v, out, lse, *options), 0.0


_KERNELS = {
    aten._scaled_dot_product_flash_attention_for_cpu.default: (attention.forward, _aten_forward, 0),
    aten._scaled_dot_product_flash_attention_for_cpu_backward.default: (attention.backward, _aten_backward, 1),
    own.flash_attention.default: (attention.forward, _own_forward, 0),
    own.flash_attention_backward.default: (attention.backward, _own_backward, 1),
}
"""What writes, its arguments (and the probability of dropout) from the operator's, and which of them is q."""


def attention_flops(eq: Equation) -> int | None:
    """Floating-point operations of an attention equation, of the scores that its mask leaves; None for another equation."""
    if eq.op not in _KERNELS:
        return None
    _, arguments, first = _KERNELS[eq.op]
    args, _ = arguments(*eq.args, **eq.kwargs)
    q, k, causal, window = args[first], args[first + 1], args[6 if first else 3], args[8 if first else 5]
    batch, heads, rows, width = q.shape
    columns = k.shape[-2]
    scores = rows * columns
    if causal:
        seen = min(window or columns, columns)  # of each row, but for the first ones
        scores = rows * seen - seen * (seen - 1) // 2 if rows == columns else scores
    return (10 if first else 4) * batch * heads * scores * width
