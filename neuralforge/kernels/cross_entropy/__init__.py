"""Cross entropy of rows of logits with class indices, without the log-probabilities in memory: forward keeps one
number a row, backward makes the gradient in one pass, in place of the logits if they aren't needed any more. Where the
cotangents of the losses are known beforehand, as those of a mean are, one pass makes both.

Any reduction, weighting or regularisation of the rows is arithmetic on vectors: mean, sum, masks; z-loss by `lse`.
"""

from __future__ import annotations

from pathlib import Path

import torch

from ...errors import KernelError
from ..native import Native, long, pointer, wide

_FILE = Path(__file__).with_name("cross_entropy.c")
_NATIVE = {torch.float32: Native(_FILE), torch.bfloat16: Native(_FILE, defines="#define BFLOAT16\n")}


@torch.library.custom_op("neuralforge::cross_entropy", mutates_args=())
def cross_entropy(
    logits: torch.Tensor, target: torch.Tensor, ignore_index: int = -100
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cross entropy of each row in nats, at least float32: `logits` [N, V], `target` int64 [N] in [0, V) or `ignore_index`, whose rows
    have a loss and a gradient of 0.

    Returns the losses [N] and the log-sum-exp of each row [N]. Raises KernelError for a target out of range.
    """
    if native(logits):
        outputs = _numbers(logits), _numbers(logits)
        forward(outputs, (logits, target, ignore_index), {})
        return outputs
    return reference(logits, target, ignore_index)


@torch.library.custom_op("neuralforge::cross_entropy_backward", mutates_args=())
def cross_entropy_backward(
    grad: torch.Tensor,
    logits: torch.Tensor,
    target: torch.Tensor,
    lse: torch.Tensor,
    grad_lse: torch.Tensor | None = None,
    ignore_index: int = -100,
) -> torch.Tensor:
    """The gradient of the logits [N, V], given those of the losses and, perhaps, of the log-sum-exps, [N] each."""
    if native(logits):
        out = torch.empty_like(logits, memory_format=torch.contiguous_format)
        backward((out,), (grad, logits, target, lse, grad_lse, ignore_index), {})
        return out
    return reference_backward(grad, logits, target, lse, grad_lse, ignore_index)


@torch.library.custom_op("neuralforge::cross_entropy_with_gradient", mutates_args=())
def cross_entropy_with_gradient(
    grad: torch.Tensor,
    logits: torch.Tensor,
    target: torch.Tensor,
    grad_lse: torch.Tensor | None = None,
    ignore_index: int = -100,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`cross_entropy`, and the gradient of the logits for the cotangents `grad` [N] of the losses and, perhaps, `grad_lse` of
    the log-sum-exps, while a row is in the cache: losses, log-sum-exps, gradient."""
    if native(logits):
        outputs = _numbers(logits), _numbers(logits), torch.empty_like(logits)
        with_gradient(outputs, (grad, logits, target, grad_lse, ignore_index), {})
        return outputs
    return reference_with_gradient(grad, logits, target, grad_lse, ignore_index)


@cross_entropy.register_fake
def _(logits, target, ignore_index=-100):
    return _numbers(logits), _numbers(logits)


@cross_entropy_backward.register_fake
def _(grad, logits, target, lse, grad_lse=None, ignore_index=-100):
    return logits.new_empty(logits.shape)


@cross_entropy_with_gradient.register_fake
def _(grad, logits, target, grad_lse=None, ignore_index=-100):
    return _numbers(logits), _numbers(logits), logits.new_empty(logits.shape)


def _numbers(logits: torch.Tensor) -> torch.Tensor:
    return logits.new_empty(logits.shape[0], dtype=wide(logits.dtype))


def _setup(ctx, inputs, output):
    logits, target, ctx.ignore_index = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(logits, target, output[1])


def _torch_backward(ctx, grad, grad_lse):
    logits, target, lse = ctx.saved_tensors
    if grad is None and grad_lse is None:
        return None, None, None
    grad = torch.zeros_like(lse) if grad is None else grad
    return cross_entropy_backward(grad, logits, target, lse, grad_lse, ctx.ignore_index), None, None


cross_entropy.register_autograd(_torch_backward, setup_context=_setup)


def reference(logits, target, ignore_index=-100):
    """The truth, in plain operators."""
    logits = logits.to(wide(logits.dtype))
    counts = target != ignore_index
    lse = logits.logsumexp(1)
    picked = logits.gather(1, torch.where(counts, target, 0).unsqueeze(1)).squeeze(1)
    return torch.where(counts, lse - picked, 0), lse


def reference_backward(grad, logits, target, lse, grad_lse=None, ignore_index=-100):
    # A function of the logits alone: `lse` is computed again, so that it needs no derivative of its own.
    dtype, logits = logits.dtype, logits.to(wide(logits.dtype))
    counts = (target != ignore_index).unsqueeze(1)
    p = logits.softmax(1)
    one_hot = (target.unsqueeze(1) == torch.arange(logits.shape[1], device=logits.device)).to(logits.dtype)
    gradient = torch.where(counts, (p - one_hot) * grad.unsqueeze(1), 0)
    return (gradient if grad_lse is None else gradient + p * grad_lse.unsqueeze(1)).to(dtype)


def reference_with_gradient(grad, logits, target, grad_lse=None, ignore_index=-100):
    losses, lse = reference(logits, target, ignore_index)
    return losses, lse, reference_backward(grad, logits, target, lse, grad_lse, ignore_index)


def available(dtype: torch.dtype = torch.float32) -> bool:
    """Is there C code for this type that can be built on this machine?"""
    return dtype in _NATIVE and _NATIVE[dtype].available()


def native(logits: torch.Tensor) -> bool:
    """Does the C code serve these logits?"""
    fits = logits.device.type == "cpu" and logits.dim() == 2 and logits.is_contiguous() and logits.numel() > 0
    return fits and available(logits.dtype)


def forward(outputs: tuple, args: tuple, kwargs: dict) -> None:
    """The C code into preallocated outputs. Raises KernelError for a target out of range."""
    logits, target, ignore_index = (*args, -100)[:3]
    _run(logits, target, ignore_index, *outputs)


def backward(outputs: tuple, args: tuple, kwargs: dict) -> None:
    """The C code into a preallocated output, which may be the memory of the logits."""
    grad, logits, target, lse, grad_lse, ignore_index = (*args, *(None, -100)[len(args) - 4 :])
    _run(logits, target, ignore_index, None, lse, grad, grad_lse, outputs[0])


def with_gradient(outputs: tuple, args: tuple, kwargs: dict) -> None:
    """The C code into preallocated outputs, of which the gradient may be in the memory of the logits. Raises KernelError
    for a target out of range."""
    grad, logits, target, grad_lse, ignore_index = (*args, *(None, -100)[len(args) - 3 :])
    losses, lse, out = outputs
    _run(logits, target, ignore_index, losses, lse, grad, grad_lse, out)


def _run(logits, target, ignore_index, losses, lse, grad=None, grad_lse=None, out=None) -> None:
    (N, V), function = logits.shape, _NATIVE[logits.dtype].library.cross_entropy
    function.restype = long
    target, grad, grad_lse = (None if t is None else t.contiguous() for t in (target, grad, grad_lse))
    tensors = logits, target, losses, lse, grad, grad_lse, out
    bad = function(*map(pointer, tensors), long(N), long(V), long(ignore_index))
    if bad >= 0:
        raise _out_of_range(int(target[bad]), bad, V, ignore_index)


def check_targets(target: torch.Tensor, V: int, ignore_index: int) -> None:
    """Raises KernelError for a target out of range."""
    bad = ((target != ignore_index) & ((target < 0) | (target >= V))).nonzero()
    if bad.numel():
        raise _out_of_range(int(target[bad[0]]), int(bad[0]), V, ignore_index)


def _out_of_range(target: int, row: int, V: int, ignore_index: int) -> KernelError:
    return KernelError(
        f"cross entropy: target {target} of row {row}; expected 0 to {V - 1}, or {ignore_index} to be ignored. "
        f"Does the vocabulary have all the tokens of the data?"
    )
