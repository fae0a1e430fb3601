"""Pooling, resampling and their kin."""

from __future__ import annotations

import torch

from .table import Derivative, aten, definition, linear, rule

# ---- averages: linear


@rule("avg_pool2d")
def avg_pool2d(y, x, *args, **kwargs):
    shape = x.shape
    how = _average_arguments(2, *args, **kwargs)
    return linear(lambda g: aten.avg_pool2d_backward(g, g.new_zeros(shape), *how))


@rule("avg_pool3d")
def avg_pool3d(y, x, *args, **kwargs):
    shape = x.shape
    how = _average_arguments(3, *args, **kwargs)
    return linear(lambda g: aten.avg_pool3d_backward(g, g.new_zeros(shape), *how))


def _average_arguments(n, kernel_size, stride=(), padding=0, ceil_mode=False, count_include_pad=True, divisor_override=None):
    padding = [padding] * n if isinstance(padding, int) else padding
    return kernel_size, stride or kernel_size, padding, ceil_mode, count_include_pad, divisor_override


@rule("avg_pool2d_backward")
def avg_pool2d_backward(dx, g, x, *how):
    return linear(lambda h: aten.avg_pool2d(h, *how)), None


@rule("avg_pool3d_backward")
def avg_pool3d_backward(dx, g, x, *how):
    return linear(lambda h: aten.avg_pool3d(h, *how)), None


@rule("_adaptive_avg_pool3d")
def adaptive_avg_pool3d(y, x, output_size):
    shape = x.shape
    return linear(lambda g: aten._adaptive_avg_pool3d_backward(g, g.new_zeros(shape)))


@rule("_adaptive_avg_pool3d_backward")
def adaptive_avg_pool3d_backward(dx, g, x):
    size = g.shape[-3:]
    return linear(lambda h: aten._adaptive_avg_pool3d(h, size)), None


def _resampling(name):
    forward, backward = getattr(aten, name), getattr(aten, f"{name}_backward")

    @rule(f"{name}.default")
    def resample(y, x, output_size, *how):
        shape = x.shape
        return linear(lambda g: backward(g, output_size, shape, *how))

    @rule(f"{name}_backward.default")
    def resample_backward(dx, g, output_size, input_size, *how):
        return linear(lambda h: forward(h, output_size, *how))


for _name in (
    "upsample_nearest1d", "upsample_nearest2d", "upsample_nearest3d", "_upsample_nearest_exact1d",
    "_upsample_nearest_exact2d", "_upsample_nearest_exact3d", "upsample_linear1d", "upsample_bilinear2d",
    "upsample_bicubic2d", "upsample_trilinear3d", "_upsample_bilinear2d_aa", "_upsample_bicubic2d_aa",
):  # fmt: skip
    _resampling(_name)


# ---- patches: im2col and col2im are each other's adjoint


@rule("im2col")
def im2col(y, x, *how):
    size = x.shape[-2:]
    return linear(lambda g: aten.col2im(g, size, *how))


@rule("col2im")
def col2im(y, x, output_size, *how):
    return linear(lambda g: aten.im2col(g, *how))


@rule("pixel_shuffle")
def pixel_shuffle(y, x, factor):
    return linear(lambda g: aten.pixel_unshuffle(g, factor))


@rule("pixel_unshuffle")
def pixel_unshuffle(y, x, factor):
    return linear(lambda g: aten.pixel_shuffle(g, factor))


# ---- maxima: each output is one input element, which the indices name


def _picked(dims: int):
    def derivative(out, x, *args, **kwargs):
        shape, index = x.shape, out[1].flatten(-dims)

        def vjp(gs):
            if gs[0] is None:
                return None
            g = gs[0].flatten(-dims)
            return g.new_zeros(*shape[:-dims], shape[-dims:].numel()).scatter_add_(-1, index, g).reshape(shape)

        return Derivative(vjp, lambda t: (t.flatten(-dims).gather(-1, index).reshape(out[1].shape), None))

    return derivative


rule("max_pool2d_with_indices", "adaptive_max_pool2d", "fractional_max_pool2d")(_picked(2))
rule("max_pool3d_with_indices", "adaptive_max_pool3d", "fractional_max_pool3d")(_picked(3))


# ---- sampling at points


@definition("grid_sampler_3d")
def grid_sampler_3d(x, grid, interpolation, padding, align_corners):
    """Sample the volume x [N, C, D, H, W] at grid [N, ..., 3], whose last dimension is (x, y, z) in [-1, 1]."""
    n, c, *sizes = x.shape
    points = [_unnormalise(grid[..., 2 - i], sizes[i], padding, align_corners) for i in range(3)]  # z, y, x
    flat = x.reshape(n, c, -1)
    if interpolation == 1:
        return _fetch(flat, [p.round() for p in points], sizes)
    lower = [p.floor() for p in points]
    total = 0
    for corner in range(8):
        at = [low + (corner >> i & 1) for i, low in enumerate(lower)]
        weight = 1
        for i, (p, low) in enumerate(zip(points, lower)):
            weight = weight * (p - low if corner >> i & 1 else low + 1 - p)
        total = total + _fetch(flat, at, sizes) * weight.unsqueeze(1)
    return total


def _unnormalise(p, size, padding, align_corners):
    """A coordinate in [-1, 1] as a position among the elements, moved inside by the padding mode."""
    p = (p + 1) / 2 * (size - 1) if align_corners else ((p + 1) * size - 1) / 2
    if padding == 1:
        p = p.clamp(0, size - 1)
    elif padding == 2:
        low, span = (0.0, size - 1.0) if align_corners else (-0.5, float(size))
        if span == 0:
            p = p * 0
        else:
            away = (p - low).abs()
            turns, rest = (away / span).floor(), away.fmod(span)
            p = torch.where(turns % 2 == 0, rest + low, span - rest + low)
        p = p.clamp(0, size - 1)
    return p


def _fetch(flat, at, sizes):
    """The elements of flat [N, C, D * H * W] at integer coordinates; zero outside."""
    inside, index = True, 0
    for p, size in zip(at, sizes):
        inside = (p >= 0) & (p < size) & inside
        index = index * size + p.clamp(0, size - 1).to(torch.int64)
    n, c = flat.shape[:2]
    found = flat.gather(2, index.reshape(n, 1, -1).expand(n, c, -1)).reshape(n, c, *index.shape[1:])
    return found * inside.unsqueeze(1).to(flat.dtype)
