"""Activations. Each has a backward kernel, so that backward keeps one tensor and makes one. The kernels are operators
like any other: differentiated once more, they descend into their definitions."""

from __future__ import annotations

import torch

from .table import Derivative, aten, definition, diagonal, rule, symmetric


@rule("sigmoid")
def sigmoid(y, x):
    return diagonal(lambda: y * (1 - y)) if y.is_complex() else symmetric(lambda g: aten.sigmoid_backward(g, y))


@rule("tanh")
def tanh(y, x):
    return diagonal(lambda: 1 - y * y) if y.is_complex() else symmetric(lambda g: aten.tanh_backward(g, y))


@rule("relu")
def relu(y, x):
    return symmetric(lambda g: aten.threshold_backward(g, y, 0))


@rule("gelu")
def gelu(y, x, *, approximate="none"):
    return symmetric(lambda g: aten.gelu_backward(g, x, approximate=approximate))


@rule("silu")
def silu(y, x):
    if x.is_complex():
        return diagonal(lambda: x.sigmoid() * (1 + x * (1 - x.sigmoid())))
    return symmetric(lambda g: aten.silu_backward(g, x))


@rule("mish")
def mish(y, x):
    return symmetric(lambda g: aten.mish_backward(g, x))


@rule("softplus")
def softplus(y, x, beta=1, threshold=20):
    return symmetric(lambda g: aten.softplus_backward(g, x, beta, threshold))


@rule("elu")
def elu(y, x, alpha=1, scale=1, input_scale=1):
    return symmetric(lambda g: aten.elu_backward(g, alpha, scale, input_scale, False, x))


@rule("celu")
def celu(y, x, alpha=1):
    return symmetric(lambda g: aten.elu_backward(g, alpha, 1, 1 / alpha, False, x))


@rule("leaky_relu")
def leaky_relu(y, x, negative_slope=0.01):
    return symmetric(lambda g: aten.leaky_relu_backward(g, x, negative_slope, False))


@rule("hardswish")
def hardswish(y, x):
    return symmetric(lambda g: aten.hardswish_backward(g, x))


@rule("hardsigmoid")
def hardsigmoid(y, x):
    return symmetric(lambda g: aten.hardsigmoid_backward(g, x))


@rule("hardtanh")
def hardtanh(y, x, low=-1, high=1):
    return symmetric(lambda g: aten.hardtanh_backward(g, x, low, high))


@rule("softshrink")
def softshrink(y, x, lambd=0.5):
    return symmetric(lambda g: aten.softshrink_backward(g, x, lambd))


@definition("softshrink_backward")
def softshrink_backward(g, x, lambd):
    return torch.where(x.abs() <= lambd, 0, g)


@rule("log_sigmoid_forward")
def log_sigmoid(out, x):
    buffer = out[1]
    slope = lambda g: aten.log_sigmoid_backward(g, x, buffer)
    return Derivative(lambda gs: None if gs[0] is None else slope(gs[0]), lambda t: (slope(t), None))


@definition("log_sigmoid_backward")
def log_sigmoid_backward(g, x, buffer):
    return g * (-x).sigmoid()  # a function of g and x alone: the buffer needs no derivative of its own


@rule("glu", forward=False)
def glu(y, x, dim=-1):
    return Derivative(lambda g: aten.glu_backward(g, x, dim))
