"""Losses that PyTorch keeps as one operator."""

from __future__ import annotations

import torch
import torch.nn.functional as F
import torch.nn.modules.linear_cross_entropy  # noqa: F401  (registers torch_nn::_linear_cross_entropy_*)

from ...errors import DifferentiationError
from ...graph.source import user_line
from .table import Derivative, aten, definition, rule

MEAN = 1  # of a loss's argument `reduction`; 0 is none, 2 the sum


@rule("huber_loss", forward=False)
def huber_loss(y, x, target, reduction=MEAN, delta=1.0):
    back = lambda g, a, b: aten.huber_loss_backward(g, a, b, reduction, delta)
    return Derivative(lambda g: back(g, x, target)), Derivative(lambda g: back(g, target, x))


@rule("smooth_l1_loss", forward=False)
def smooth_l1_loss(y, x, target, reduction=MEAN, beta=1.0):
    back = lambda g, a, b: aten.smooth_l1_loss_backward(g, a, b, reduction, beta)
    return Derivative(lambda g: back(g, x, target)), Derivative(lambda g: back(g, target, x))


@rule("binary_cross_entropy", forward=False)
def binary_cross_entropy(y, x, target, weight=None, reduction=MEAN):
    each = lambda g: g / x.numel() if reduction == MEAN else g
    weighted = lambda g: each(g) if weight is None else each(g) * weight
    return (
        Derivative(lambda g: aten.binary_cross_entropy_backward(g, x, target, weight, reduction)),
        Derivative(lambda g: weighted(g) * -torch.logit(x)),
        Derivative(lambda g: each(g) * aten.binary_cross_entropy(x, target, None, 0)),
    )


@rule("binary_cross_entropy_with_logits", forward=False)
def binary_cross_entropy_with_logits(y, x, target, weight=None, pos_weight=None, reduction=MEAN):
    each = lambda g: g / x.numel() if reduction == MEAN else g
    weighted = lambda g: each(g) if weight is None else each(g) * weight

    def by_logits(g):
        if pos_weight is None:
            return weighted(g) * (x.sigmoid() - target)
        positive = pos_weight * target
        return weighted(g) * (x.sigmoid() * (positive + 1 - target) - positive)

    def by_target(g):
        return weighted(g) * (-x if pos_weight is None else F.logsigmoid(-x) - pos_weight * F.logsigmoid(x))

    return (
        Derivative(by_logits),
        Derivative(by_target),
        Derivative(lambda g: each(g) * aten.binary_cross_entropy_with_logits(x, target, None, pos_weight, 0)),
        Derivative(lambda g: weighted(g) * -target * F.logsigmoid(x)),
    )



@definition("torch_nn::_linear_cross_entropy_batch_chunked")
def linear_cross_entropy(
    x, linear_weight, target, linear_bias, weight, reduction, ignore_index, label_smoothing, batch_chunk_size,
    acc_policy, acc_dtype, allow_retain_graph, *compute_gradients,
):  # fmt: skip
    if any(compute_gradients):
        raise DifferentiationError(
            f"{user_line()}: F.linear_cross_entropy was called on tensors with requires_grad=True, and so computes "
            f"torch's gradients beside the loss. Pass detached tensors: nf.grad doesn't use requires_grad."
        )
    loss = F.cross_entropy(
        F.linear(x, linear_weight, linear_bias), target, weight,
        ignore_index=ignore_index, reduction=reduction, label_smoothing=label_smoothing,
    )  # fmt: skip
    return loss, x.new_empty(0, 0), x.new_empty(0, 0), x.new_empty(0)


@definition("torch_nn::_linear_cross_entropy_batch_chunked_no_reduction")
def linear_cross_entropy_rows(
    x, linear_weight, target, linear_bias, weight, ignore_index, batch_chunk_size, acc_policy, acc_dtype
):
    logits = F.linear(x, linear_weight, linear_bias)
    return F.cross_entropy(logits, target, weight, ignore_index=ignore_index, reduction="none")
