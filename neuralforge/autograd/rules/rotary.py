"""Our rotary positions: linear in x, with the transposed rotation as its adjoint, by the same kernel; linear in the tables."""

from __future__ import annotations

import torch

from ...kernels import rotary as kernel
from .table import Derivative, linear, rule


@rule("neuralforge::rotary")
def rotary(y, x, cos, sin, transposed=False):
    of_cos = lambda t: kernel.rotary(x, t, torch.zeros_like(t), transposed)
    of_sin = lambda t: kernel.rotary(x, torch.zeros_like(t), t, transposed)
    return (
        linear(lambda g: kernel.rotary(g, cos, sin, not transposed)),
        Derivative(lambda g: kernel.gradient_of_cos(g, x, cos), of_cos),
        Derivative(lambda g: kernel.gradient_of_sin(g, x, sin, transposed), of_sin),
        None,
    )
