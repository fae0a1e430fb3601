"""Layers of neural networks that PyTorch keeps as one operator.

Their backward kernels (`native_layer_norm_backward` and so on) are operators like any other: when one is
differentiated in its turn it descends into its definition.
"""

from __future__ import annotations

import math

import torch

from .table import Derivative, Joint, aten, definition, plus, rule


@rule("native_layer_norm", forward=False)
def layer_norm(out, x, shape, weight, bias, eps):
    _, mean, rstd = out
    size = math.prod(shape)

    def vjp(gs, wanted):
        g, g_mean, g_rstd = gs
        dx = dw = db = None
        if g is not None:
            mask = [wanted[0], wanted[2], wanted[3]]
            dx, dw, db = aten.native_layer_norm_backward(g, x, shape, mean, rstd, weight, bias, mask)
        if g_mean is not None and wanted[0]:
            dx = plus(dx, (g_mean / size).expand(x.shape))
        if g_rstd is not None and wanted[0]:
            dx = plus(dx, g_rstd * -(rstd**3) * (x - mean) / size)
        return dx, None, dw, db, None

    return Joint(vjp)


@rule("nll_loss_forward", forward=False)
def nll_loss(out, x, target, weight, reduction, ignore_index):
    total = out[1]
    return Derivative(
        lambda gs: None
        if gs[0] is None
        else aten.nll_loss_backward(gs[0], x, target, weight, reduction, ignore_index, total)
    ), None  # none for the weight: an error, as in PyTorch


@rule("native_dropout")
def native_dropout(out, x, p, train):
    mask = out[1]
    scale = 0.0 if p == 1 else 1 / (1 - p)
    drop = lambda g: g if not train else g * (mask.to(g.dtype) * scale)
    return Derivative(lambda gs: None if gs[0] is None else drop(gs[0]), lambda t: (drop(t), None))


@rule("rrelu_with_noise_functional")
def rrelu(out, x, noise, lower=0.125, upper=1 / 3, training=False, generator=None):
    drawn = out[1]
    slope = lambda: drawn if training else torch.where(x > 0, 1, (lower + upper) / 2).to(x.dtype)
    return Derivative(lambda gs: None if gs[0] is None else gs[0] * slope(), lambda t: (t * slope(), None))


# ---- attention


@rule("_scaled_dot_product_flash_attention_for_cpu", forward=False)
def flash_attention(out, q, k, v, dropout_p=0.0, is_causal=False, *, attn_mask=None, scale=None):
    def vjp(gs, wanted):
        g, g_lse = gs
        grads = [None] * 3
        if g is not None:
            grads = aten._scaled_dot_product_flash_attention_for_cpu_backward(
                g, q, k, v, *out, dropout_p, is_causal, attn_mask=attn_mask, scale=scale
            )
        if g_lse is not None:  # only a caller of the internal operator sees the log-sum-exp
            p, _ = _scores(q, _group(k, q.shape[1]), is_causal, attn_mask, scale)
            ds = g_lse.unsqueeze(-1) * p * (1 / math.sqrt(q.shape[-1]) if scale is None else scale)
            dk = _ungroup(ds.transpose(-2, -1) @ q, k)
            grads = [plus(ds @ _group(k, q.shape[1]), grads[0]), plus(dk, grads[1]), grads[2]]
        return (*grads, None, None)

    return Joint(vjp)


def _scores(q, k, is_causal, attn_mask, scale):
    """Attention weights, softmax(q k^T scale + mask)."""
    s = (q @ k.transpose(-2, -1)) * (1 / math.sqrt(q.shape[-1]) if scale is None else scale)
    if is_causal:
        rows, columns = s.shape[-2:]
        keep = torch.ones(rows, columns, dtype=torch.bool, device=s.device).tril()
        s = s.masked_fill(~keep, -math.inf)
    if attn_mask is not None:
        s = s + attn_mask if attn_mask.dtype != torch.bool else s.masked_fill(~attn_mask, -math.inf)
    return s.softmax(-1), s.logsumexp(-1)


def _group(x, heads):
    """Grouped-query attention: each key or value head serves `heads / x.shape[1]` query heads."""
    return x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], 1)


def _ungroup(d, like):
    return d if d.shape == like.shape else d.reshape(*like.shape[:2], -1, *d.shape[2:]).sum(2)


@definition("_scaled_dot_product_flash_attention_for_cpu")
def flash_attention_definition(q, k, v, dropout_p=0.0, is_causal=False, *, attn_mask=None, scale=None):
    p, logsumexp = _scores(q, _group(k, q.shape[1]), is_causal, attn_mask, scale)
    return p @ _group(v, q.shape[1]), logsumexp


@definition("_scaled_dot_product_flash_attention_for_cpu_backward")
def flash_attention_backward(g, q, k, v, out, lse, dropout_p, is_causal, *, attn_mask=None, scale=None):
    # A function of g, q, k, v alone: `out` and `lse` are recomputed, so that they need no derivative of their own.
    heads = q.shape[1]
    kk, vv = _group(k, heads), _group(v, heads)
    p, _ = _scores(q, kk, is_causal, attn_mask, scale)
    dv = p.transpose(-2, -1) @ g
    dp = g @ vv.transpose(-2, -1)
    ds = p * (dp - (dp * p).sum(-1, keepdim=True))
    ds = ds * (1 / math.sqrt(q.shape[-1]) if scale is None else scale)
    return ds @ kk, _ungroup(ds.transpose(-2, -1) @ q, k), _ungroup(dv, v)
