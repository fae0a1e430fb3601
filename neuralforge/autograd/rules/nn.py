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


@rule("native_group_norm", forward=False)
def group_norm(out, x, weight, bias, N, C, inner, groups, eps):
    _, mean, rstd = out

    def vjp(gs, wanted):
        g, g_mean, g_rstd = gs
        dx = dw = db = None
        if g is not None:
            how = mean, rstd, weight, N, C, inner, groups, [wanted[0], wanted[1], wanted[2]]
            dx, dw, db = aten.native_group_norm_backward(g.contiguous(), x.contiguous(), *how)
        size = C // groups * inner
        if g_mean is not None and wanted[0]:
            dx = plus(dx, (g_mean.unsqueeze(-1) / size).expand(N, groups, size).reshape(x.shape))
        if g_rstd is not None and wanted[0]:
            centred = x.reshape(N, groups, size) - mean.unsqueeze(-1)
            dx = plus(dx, ((g_rstd * -(rstd**3) / size).unsqueeze(-1) * centred).reshape(x.shape))
        return dx, dw, db, *[None] * 5

    return Joint(vjp)


def _nll_loss(backward):
    def derivative(out, x, target, weight, reduction, ignore_index):
        def vjp(gs):
            g, total = gs[0], out[1]
            return None if g is None else backward(g, x, target, weight, reduction, ignore_index, total)

        return Derivative(vjp), None  # none for the weight: an error, as in PyTorch

    return derivative


rule("nll_loss_forward", forward=False)(_nll_loss(aten.nll_loss_backward))
rule("nll_loss2d_forward", forward=False)(_nll_loss(aten.nll_loss2d_backward))


@rule("_native_batch_norm_legit_functional", forward=False)
def batch_norm(out, x, weight, bias, running_mean, running_var, training, momentum, eps):
    mean, rstd = out[1:3]

    def vjp(gs, wanted):
        g, g_mean, g_rstd = gs[:3]  # second derivatives come through the statistics
        dx = dw = db = None
        if g is not None:
            how = weight, running_mean, running_var, mean, rstd, training, eps, list(wanted[:3])
            dx, dw, db = aten.native_batch_norm_backward(g, x, *how)
        size, each = x.numel() // max(x.shape[1], 1), [1, -1, *[1] * (x.dim() - 2)]
        if g_mean is not None and wanted[0] and training:
            dx = plus(dx, (g_mean / size).view(each).expand(x.shape))
        if g_rstd is not None and wanted[0] and training:
            dx = plus(dx, (g_rstd * -(rstd**3) / size).view(each) * (x - mean.view(each)))
        return dx, dw, db, *[None] * 5

    return Joint(vjp)


@rule("_native_batch_norm_legit.no_stats", forward=False)
def batch_norm_without_statistics(out, x, weight, bias, training, momentum, eps):
    return batch_norm(out, x, weight, bias, None, None, training, momentum, eps)


@rule("_native_batch_norm_legit_no_training", forward=False)
def batch_norm_in_evaluation(out, x, weight, bias, running_mean, running_var, momentum, eps):
    return batch_norm(out, x, weight, bias, running_mean, running_var, False, momentum, eps)


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


# ---- recurrent layers


@definition("mkldnn_rnn_layer")
def lstm_layer(x, w_ih, w_hh, b_ih, b_hh, hx, cx, reverse, batch_sizes, mode, hidden_size, num_layers, has_biases, *_):
    """One direction of one layer of an LSTM over x [T, B, in]; the gates are in torch.nn.LSTM's order."""
    h, c = hx.reshape(-1, hx.shape[-1]), cx.reshape(-1, cx.shape[-1])
    gates = x @ w_ih.t()
    steps = (gates + (b_ih + b_hh) if has_biases else gates).unbind(0)
    made = []
    for step in steps[::-1] if reverse else steps:
        i, f, g, o = (step + h @ w_hh.t()).chunk(4, -1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        h = o.sigmoid() * c.tanh()
        made.append(h)
    y = torch.stack(made[::-1] if reverse else made)
    return y, h.reshape(hx.shape), c.reshape(cx.shape), x.new_empty(0)
