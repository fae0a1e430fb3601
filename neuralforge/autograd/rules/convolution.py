"""Convolution. Its backward kernel descends into convolutions."""

from __future__ import annotations

from .table import Derivative, aten, definition, rule


@rule("convolution")
def convolution(y, x, w, b, stride, padding, dilation, transposed, output_padding, groups):
    how = stride, padding, dilation, transposed, output_padding, groups
    bias_size = None if b is None else b.shape
    back = lambda g, i: aten.convolution_backward(g, x, w, None, *how, [i == 0, i == 1, False])[i]
    channels = [1, -1] + [1] * (y.dim() - 2)
    return (
        Derivative(lambda g: back(g, 0), lambda t: aten.convolution(t, w, None, *how)),
        Derivative(lambda g: back(g, 1), lambda t: aten.convolution(x, t, None, *how)),
        Derivative(
            lambda g: g.sum([0, *range(2, g.dim())]).reshape(bias_size),
            lambda t: t.reshape(channels).expand(y.shape),
        ),
    )


@definition("convolution_backward")
def convolution_backward(
    g, x, w, bias_size, stride, padding, dilation, transposed, output_padding, groups, output_mask
):
    dx = dw = db = None
    spatial = x.dim() - 2
    stride, padding, dilation = (list(s) * spatial if len(s) == 1 else list(s) for s in (stride, padding, dilation))
    if output_mask[0]:
        if transposed:
            dx = aten.convolution(g, w, None, stride, padding, dilation, False, [0] * spatial, groups)
            for i in range(2, x.dim()):  # an output_padding beyond the stride
                dx = dx.narrow(i, 0, x.shape[i])
        else:
            reach = [
                (g.shape[i + 2] - 1) * stride[i] - 2 * padding[i] + dilation[i] * (w.shape[i + 2] - 1) + 1
                for i in range(spatial)
            ]
            extra = [x.shape[i + 2] - reach[i] for i in range(spatial)]  # what the last stride left over
            dx = aten.convolution(g, w, None, stride, padding, dilation, True, extra, groups)
    if output_mask[1]:
        source, image = (x, g) if transposed else (g, x)
        dw = _weight_gradient(image, source, w.shape, stride, padding, dilation, groups)
    if output_mask[2]:
        db = g.sum([0, *range(2, g.dim())])
    return dx, dw, db


def _weight_gradient(image, g, shape, stride, padding, dilation, groups):
    """Each weight's gradient is the image correlated with `g` over batch and positions: a convolution with batch and
    channels, stride and dilation exchanged."""
    spatial = list(range(3, 3 + image.dim() - 2))
    n, rest = image.shape[0], image.shape[2:]
    image = image.reshape(n, groups, -1, *rest).permute(2, 1, 0, *spatial).reshape(-1, groups * n, *rest)
    found = aten.convolution(
        image, g.transpose(0, 1), None, dilation, padding, stride, False, [0] * len(stride), groups
    ).transpose(0, 1)
    for i, k in enumerate(shape[2:]):
        found = found.narrow(i + 2, 0, k)
    return found
