"""Fourier transforms: linear, each the other direction's adjoint."""

from __future__ import annotations

import torch

from .table import aten, linear, rule


@rule("_fft_c2c")
def fft_c2c(y, x, dim, normalization, forward):
    return linear(lambda g: aten._fft_c2c(g, dim, normalization, not forward))


@rule("_fft_r2c")
def fft_r2c(y, x, dim, normalization, onesided):
    n = x.shape[dim[-1]]

    def vjp(g):
        if onesided:  # the half that was not returned gets no cotangent
            last = dim[-1] % g.dim()
            missing = list(g.shape)
            missing[last] = n - missing[last]
            g = torch.cat([g, g.new_zeros(missing)], last)
        return torch.real(aten._fft_c2c(g, dim, normalization, False))

    return linear(vjp)


@rule("_fft_c2r")
def fft_c2r(y, x, dim, normalization, n):
    shape = x.shape

    def vjp(g):
        g = aten._fft_r2c(g, dim, normalization, True)
        last = dim[-1] % g.dim()
        # Every frequency but zero (and the middle one of an even length) stands for itself and its mirror image.
        inner = n - g.shape[last]
        rest = g.shape[last] - 1 - inner
        weights = torch.tensor([1.0] + [2.0] * inner + [1.0] * rest, dtype=torch.float64, device=g.device)
        return g * weights.to(g.real.dtype).reshape([-1] + [1] * (len(shape) - 1 - last))

    return linear(vjp)
