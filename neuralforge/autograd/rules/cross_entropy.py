"""Our cross entropy. One kernel gives the gradient; differentiated once more it descends into its plain truth."""

from __future__ import annotations

import torch

from ...kernels import cross_entropy as kernel
from ...kernels import linear_cross_entropy as linear
from .table import Derivative, Joint, definition, rule


@rule("neuralforge::cross_entropy", forward=False)
def cross_entropy(results, logits, target, ignore_index=-100):
    _, lse = results

    def vjp(gs):
        grad, grad_lse = gs
        grad = torch.zeros_like(lse) if grad is None else grad
        return kernel.cross_entropy_backward(grad, logits, target, lse, grad_lse, ignore_index)

    return Derivative(vjp)


definition("neuralforge::cross_entropy")(kernel.reference)
definition("neuralforge::cross_entropy_backward")(kernel.reference_backward)
definition("neuralforge::cross_entropy_with_gradient")(kernel.reference_with_gradient)


@rule("neuralforge::linear_cross_entropy", forward=False)
def linear_cross_entropy(results, x, weight, target, bias=None, ignore_index=-100):
    _, lse = results

    def vjp(gs, wanted):
        grad, grad_lse = gs
        grad = torch.zeros_like(lse) if grad is None else grad
        dx, dw, db = linear.linear_cross_entropy_backward(grad, x, weight, target, lse, bias, grad_lse, ignore_index)
        return dx, dw, None, None if bias is None else db, None

    return Joint(vjp)


definition("neuralforge::linear_cross_entropy")(linear.reference)
definition("neuralforge::linear_cross_entropy_backward")(linear.reference_backward)
definition("neuralforge::linear_cross_entropy_with_gradients")(linear.reference_with_gradients)
