"""Our rotary positions: linear in x, with the transposed rotation as its adjoint, by the same kernel; linear in the tables."""

from __future__ import annotations

import torch

from ...kernels import rotary as kernel
from .table import Derivative, linear, rule


@rule("neuralforge::rotary")
def rotary(y, x, cos, sin, transposed=False, interleaved=False):
    of_cos = lambda t: kernel.rotary(x, t, torch.zeros_like(t), transposed, interleaved)
    of_sin = lambda t: kernel.rotary(x, torch.zeros_like(t), t, transposed, interleaved)
    return (
        linear(lambda g: kernel.rotary(g, cos, sin, not transposed, interleaved)),
        Derivative(lambda g: kernel.gradient_of_cos(g, x, cos, interleaved), of_cos),
        Derivative(lambda g: kernel.gradient_of_sin(g, x, sin, transposed, interleaved), of_sin),
        None,
        None,
    )
