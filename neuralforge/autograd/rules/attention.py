"""Our flash attention. One kernel gives the gradients; differentiated once more it descends into its plain truth."""

from __future__ import annotations

import torch

from ...kernels import attention
from .table import Joint, definition, rule


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
