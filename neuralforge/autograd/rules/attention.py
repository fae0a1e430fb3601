"""Flash attention, ours and PyTorch's on the CPU. One kernel gives the gradients; differentiated once more it descends into
the plain truth."""

from __future__ import annotations

import torch

from ...kernels import attention
from .table import Joint, aten, definition, rule


@rule("neuralforge::flash_attention", forward=False)
def flash_attention(
    results, q, k, v,
    is_causal=False, scale=None, window=None, mask=None, dropout_p=0.0, seed=None, q_starts=None, k_starts=None,
):  # fmt: skip
    out, lse = results

    def vjp(gs, wanted):
        g, g_lse = gs
        g = torch.zeros_like(out) if g is None else g
        options = is_causal, scale, window, mask, dropout_p, seed, g_lse, q_starts, k_starts
        return *attention.flash_attention_backward(g, q, k, v, out, lse, *options), *[None] * 8

    return Joint(vjp)


definition("neuralforge::flash_attention")(attention.reference)
definition("neuralforge::flash_attention_backward")(attention.reference_backward)


@rule("_scaled_dot_product_flash_attention_for_cpu", forward=False)
def flash_attention_for_cpu(results, q, k, v, dropout_p=0.0, is_causal=False, *, attn_mask=None, scale=None):
    out, lse = results

    def vjp(gs, wanted):
        g, g_lse = gs
        if g_lse is None:
            backward, options = aten._scaled_dot_product_flash_attention_for_cpu_backward, (dropout_p, is_causal)
            grads = backward(g, q, k, v, out, lse, *options, attn_mask=attn_mask, scale=scale)
        else:  # only a caller of the internal operator sees the log-sum-exp
            g = torch.zeros_like(out) if g is None else g
            grads = attention.reference_backward(g, q, k, v, out, lse, is_causal, scale, mask=attn_mask, g_lse=g_lse)
        return *grads, None, None

    return Joint(vjp)


@definition("_scaled_dot_product_flash_attention_for_cpu")
def flash_attention_for_cpu_definition(q, k, v, dropout_p=0.0, is_causal=False, *, attn_mask=None, scale=None):
    return attention.reference(q, k, v, is_causal, scale, mask=attn_mask)


@definition("_scaled_dot_product_flash_attention_for_cpu_backward")
def flash_attention_for_cpu_backward(g, q, k, v, out, lse, dropout_p, is_causal, *, attn_mask=None, scale=None):
    return attention.reference_backward(g, q, k, v, out, lse, is_causal, scale, mask=attn_mask)
