"""Cross entropy of a linear layer's outputs without all the logits in memory: some rows of them at a time are made,
used and overwritten (as in Liger Kernel, https://arxiv.org/abs/2410.10989).

The loss is linear in the cotangents of its rows, so where these are known beforehand, as those of a mean are, the
gradients are made together with the losses, and nothing is computed twice. Else the backward pass makes the logits again
(Cut Cross-Entropy, https://arxiv.org/abs/2411.09009).
"""

from __future__ import annotations

import math

import torch

from .. import cross_entropy, matmul
from ..native import wide as wide_dtype

ROWS = 512
"""Rows of logits in memory at once, if there are so many; and more, up to half of them, while they are no more than `LOGITS`
numbers."""
LOGITS = 2**23
"""Of float32, and twice as many of bfloat16. The fewer rows, the more often the weight is packed and its gradient gone
through: of 2048 x 384 x 8192, half the rows at once take as long as all, a quarter 8 % longer, an eighth 17 %."""
PART = 8192
"""Rows of a product in bfloat16 at once that is added to sums in float32."""
Tensor = torch.Tensor


@torch.library.custom_op("neuralforge::linear_cross_entropy", mutates_args=())
def linear_cross_entropy(
    x: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None = None, ignore_index: int = -100
) -> tuple[Tensor, Tensor]:
    """Cross entropy in nats of each row of the logits x weight^T + bias: `x` [N, D], `weight` [V, D], `bias` [V], `target` int64 [N] in
    [0, V) or `ignore_index`, whose rows have a loss and a gradient of 0.

    Returns the losses [N] and the log-sum-exp of each row [N], at least float32. Raises KernelError for a target out of range.
    """
    outputs = _numbers(x), _numbers(x)
    forward(outputs, (x, weight, target, bias, ignore_index), {})
    return outputs


@torch.library.custom_op("neuralforge::linear_cross_entropy_backward", mutates_args=())
def linear_cross_entropy_backward(
    grad: Tensor, x: Tensor, weight: Tensor, target: Tensor, lse: Tensor, bias: Tensor | None = None,
    grad_lse: Tensor | None = None, ignore_index: int = -100,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The gradients of x, weight and bias, given those of the losses and, perhaps, of the log-sum-exps, [N] each. Without a
    bias the last has no elements."""
    outputs = _gradients(x, weight, bias)
    _run(x, weight, target, bias, ignore_index, None, lse, grad, grad_lse, outputs)
    return outputs


@torch.library.custom_op("neuralforge::linear_cross_entropy_with_gradients", mutates_args=())
def linear_cross_entropy_with_gradients(
    grad: Tensor, x: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None = None, ignore_index: int = -100,
    wide: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """`linear_cross_entropy`, and the gradients for the cotangents `grad` [N] of the losses: losses, log-sum-exps, and the
    gradients of x, weight and bias; `wide`: that of the weight in the type of the losses, in which it is summed up."""
    outputs = _numbers(x), _numbers(x), *_gradients(x, weight, bias, wide)
    with_gradients(outputs, (grad, x, weight, target, bias, ignore_index, wide), {})
    return outputs


@linear_cross_entropy.register_fake
def _(x, weight, target, bias=None, ignore_index=-100):
    return _numbers(x), _numbers(x)


@linear_cross_entropy_backward.register_fake
def _(grad, x, weight, target, lse, bias=None, grad_lse=None, ignore_index=-100):
    return _gradients(x, weight, bias)


@linear_cross_entropy_with_gradients.register_fake
def _(grad, x, weight, target, bias=None, ignore_index=-100, wide=False):
    return _numbers(x), _numbers(x), *_gradients(x, weight, bias, wide)


def _numbers(x: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], dtype=wide_dtype(x.dtype))


def _gradients(x: Tensor, weight: Tensor, bias: Tensor | None, wide: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """The weight's is laid out as the weight."""
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    dw = torch.empty_like(weight, dtype=wide_dtype(x.dtype) if wide else weight.dtype)
    return dx, dw, x.new_empty(0) if bias is None else torch.empty_like(bias)


def _setup(ctx, inputs, output):
    x, weight, target, bias, ctx.ignore_index = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, weight, target, bias, output[1])


def _torch_backward(ctx, grad, grad_lse):
    x, weight, target, bias, lse = ctx.saved_tensors
    if grad is None and grad_lse is None:
        return (None,) * 5
    grad = torch.zeros_like(lse) if grad is None else grad
    dx, dw, db = linear_cross_entropy_backward(grad, x, weight, target, lse, bias, grad_lse, ctx.ignore_index)
    return dx, dw, None, None if bias is None else db, None


linear_cross_entropy.register_autograd(_torch_backward, setup_context=_setup)


def reference(x, weight, target, bias=None, ignore_index=-100):
    """The truth, in plain operators."""
    return cross_entropy.reference(_logits(x, weight, bias), target, ignore_index)


def reference_backward(grad, x, weight, target, lse, bias=None, grad_lse=None, ignore_index=-100):
    logits = _logits(x, weight, bias)
    g = cross_entropy.reference_backward(grad, logits, target, lse, grad_lse, ignore_index)
    return g @ weight, g.t() @ x, x.new_empty(0) if bias is None else g.sum(0)


def reference_with_gradients(grad, x, weight, target, bias=None, ignore_index=-100, wide=False):
    losses, lse = reference(x, weight, target, bias, ignore_index)
    dx, dw, db = reference_backward(grad, x, weight, target, lse, bias, None, ignore_index)
    return losses, lse, dx, dw.to(losses.dtype if wide else dw.dtype), db


def _logits(x, weight, bias):
    logits = x @ weight.t()
    return logits if bias is None else logits + bias


def forward(outputs: tuple, args: tuple, kwargs: dict) -> None:
    """Into preallocated outputs."""
    x, weight, target, bias, ignore_index = (*args, *(None, -100)[len(args) - 3 :])
    _run(x, weight, target, bias, ignore_index, *outputs, None, None, None)


def with_gradients(outputs: tuple, args: tuple, kwargs: dict) -> None:
    """Into preallocated outputs."""
    grad, x, weight, target, bias, ignore_index = (*args, *(None, -100)[len(args) - 4 :])[:6]
    _run(x, weight, target, bias, ignore_index, *outputs[:2], grad, None, outputs[2:])


def rows_at_once(N: int, V: int, dtype: torch.dtype) -> int:
    """Of N rows of V logits in equal parts."""
    rows, logits = (count * 4 // dtype.itemsize for count in (ROWS, LOGITS))
    most = max(rows, min(logits // max(V, 1), math.ceil(N / 2)))
    parts = max(1, math.ceil(N / most))
    return max(1, math.ceil(N / parts))


def _run(x, weight, target, bias, ignore_index, losses, lse, grad, grad_lse, gradients) -> None:
    """Losses unless `losses` is None, gradients if there are cotangents."""
    N, V = x.shape[0], weight.shape[0]
    cross_entropy.check_targets(target, V, ignore_index)
    if gradients is not None:
        dx, dw, db = gradients
        total = torch.zeros_like(dw, dtype=lse.dtype) if N == 0 or dw.dtype != lse.dtype else dw
        bias_total = torch.zeros(0 if bias is None else V, dtype=lse.dtype)
    size = rows_at_once(N, V, x.dtype)
    memory = x.new_empty(size, V)
    for start in range(0, N, size):
        rows = slice(start, min(start + size, N))
        logits = memory[: rows.stop - start]
        _product(logits, x[rows], weight.t())
        if bias is not None:
            logits += bias
        numbers = None if losses is None else (losses[rows], lse[rows])
        if gradients is None:
            _losses(numbers, logits, target[rows], ignore_index)
            continue
        of_lse = None if grad_lse is None else grad_lse[rows]
        g = _logits_gradient(numbers, logits, grad[rows], target[rows], lse[rows], of_lse, ignore_index)
        _product(dx[rows], g, weight)
        _product(total, g.t(), x[rows], more=start > 0 or total is not dw)
        if bias is not None:
            bias_total += g.sum(0)
    if gradients is not None:
        if total is not dw:
            dw.copy_(total)
        if bias is not None:
            db.copy_(bias_total)


def _losses(outputs: tuple, logits: Tensor, target: Tensor, ignore_index: int) -> None:
    if cross_entropy.native(logits):
        return cross_entropy.forward(outputs, (logits, target, ignore_index), {})
    for out, result in zip(outputs, cross_entropy.reference(logits, target, ignore_index)):
        out.copy_(result)


def _logits_gradient(outputs: tuple | None, logits, grad, target, lse, grad_lse, ignore_index) -> Tensor:
    """And the losses with it, if there are outputs for them."""
    if not cross_entropy.native(logits):
        if outputs is not None:
            _losses(outputs, logits, target, ignore_index)
        return cross_entropy.reference_backward(grad, logits, target, lse, grad_lse, ignore_index)
    if outputs is None:
        cross_entropy.backward((logits,), (grad, logits, target, lse, grad_lse, ignore_index), {})
    else:
        cross_entropy.with_gradient((*outputs, logits), (grad, logits, target, grad_lse, ignore_index), {})
    return logits


def _product(out: Tensor, a: Tensor, b: Tensor, more: bool = False) -> None:
    """a b, or `more`, into `out`. By our kernel where it serves: it adds within the product, and needs no memory."""
    if matmul.native(a, b, out):
        matmul.forward((out,), (a, b), {}, add=more)
    elif out.dtype == a.dtype:
        out.addmm_(a, b) if more else torch.mm(a, b, out=out)
    else:  # rounded as the operands are
        for to, of in zip(out.split(PART), a.split(PART)):
            _product(rounded := a.new_empty(to.shape), of, b)
            to.add_(rounded) if more else to.copy_(rounded)


def in_place_of_logits(x: Tensor, weight: Tensor, wide: bool = False) -> int:
    """Bytes of what is in memory instead of all the logits; `wide`: sums of the weight's gradient are in the result."""
    (V, D), sums = weight.shape, wide_dtype(x.dtype)
    narrow, numbers = x.dtype != sums, rows_at_once(x.shape[0], V, x.dtype) * V
    return (numbers + narrow * min(PART, V) * D) * x.element_size() + narrow * (not wide) * V * D * sums.itemsize


def scratch_bytes(x: Tensor, weight: Tensor, wide: bool = False) -> int:
    """Of all that is allocated for a while beside the results, products' packed operands included."""
    (V, D), rows, packed = weight.shape, rows_at_once(x.shape[0], weight.shape[0], x.dtype), 0
    if matmul.native(x, weight):
        products = ((rows, V), D), ((rows, D), V), ((V, D), rows)
        packed = max(matmul.scratch_bytes(shape, K, x.dtype) for shape, K in products)
    return in_place_of_logits(x, weight, wide) + packed
