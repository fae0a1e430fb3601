"""Cross entropy of rows of logits with class indices, without the log-probabilities in memory: forward keeps one
number a row, backward makes the gradient in one pass, in place of the logits if they aren't needed any more."""

from __future__ import annotations

from pathlib import Path

import torch

from ...errors import KernelError
from ..native import Native, long, pointer

_native = Native(Path(__file__).with_name("cross_entropy.c"))


@torch.library.custom_op("neuralforge::cross_entropy", mutates_args=())
def cross_entropy(
    logits: torch.Tensor, target: torch.Tensor, ignore_index: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Mean cross entropy in nats: `logits` float32 [N, V], `target` int64 [N] in [0, V) or `ignore_index`.

    Returns the loss (scalar; NaN where every target is ignored, as in PyTorch), the log-sum-exp of each row [N], and
    the number of targets that count (float scalar).
    """
    outputs = logits.new_empty(()), logits.new_empty(logits.shape[0]), logits.new_empty(())
    if native(logits):
        forward(outputs, (logits, target, ignore_index), {})
        return outputs
    return reference(logits, target, ignore_index)


@torch.library.custom_op("neuralforge::cross_entropy_backward", mutates_args=())
def cross_entropy_backward(
    grad: torch.Tensor, logits: torch.Tensor, target: torch.Tensor, lse: torch.Tensor, count: torch.Tensor, ignore_index: int
) -> torch.Tensor:
    """The gradient with respect to the logits [N, V], given that of the loss (scalar) and forward's results."""
    if native(logits):
        out = torch.empty_like(logits, memory_format=torch.contiguous_format)
        backward((out,), (grad, logits, target, lse, count, ignore_index), {})
        return out
    return reference_backward(grad, logits, target, lse, count, ignore_index)


@cross_entropy.register_fake
def _(logits, target, ignore_index):
    return logits.new_empty(()), logits.new_empty(logits.shape[0]), logits.new_empty(())


@cross_entropy_backward.register_fake
def _(grad, logits, target, lse, count, ignore_index):
    return logits.new_empty(logits.shape)


def reference(logits, target, ignore_index):
    """The truth, in plain operators."""
    counts = target != ignore_index
    lse = logits.logsumexp(1)
    picked = logits.gather(1, torch.where(counts, target, 0).unsqueeze(1)).squeeze(1)
    count = counts.sum().to(logits.dtype)
    return torch.where(counts, lse - picked, 0).sum() / count, lse, count


def reference_backward(grad, logits, target, lse, count, ignore_index):
    counts = (target != ignore_index).unsqueeze(1)
    one_hot = torch.nn.functional.one_hot(target.clamp(min=0), logits.shape[1]).to(logits.dtype)
    return torch.where(counts, ((logits - lse.unsqueeze(1)).exp() - one_hot) * (grad / count), 0)


def available() -> bool:
    """Can the C code be built on this machine?"""
    return _native.available()


def native(logits: torch.Tensor) -> bool:
    """Does the C code serve these logits?"""
    fits = logits.dtype == torch.float32 and logits.device.type == "cpu" and logits.dim() == 2 and logits.is_contiguous()
    return fits and logits.numel() > 0 and available()


def forward(outputs: tuple, args: tuple, kwargs: dict) -> None:
    """The C code into preallocated outputs. Raises KernelError for a target out of range."""
    logits, target, ignore_index = args
    loss, lse, count = outputs
    N, V = logits.shape
    _native.library.cross_entropy.restype = long
    bad = _native.library.cross_entropy(
        pointer(logits), pointer(target.contiguous()), pointer(lse), pointer(loss), pointer(count), long(N), long(V),
        long(ignore_index),
    )  # fmt: skip
    if bad >= 0:
        raise KernelError(
            f"cross entropy: target {int(target[bad])} of row {bad}; expected 0 to {V - 1}, or {ignore_index} to be ignored. "
            f"Does the vocabulary have all the tokens of the data?"
        )


def backward(outputs: tuple, args: tuple, kwargs: dict) -> None:
    """The C code into a preallocated output, which may be the memory of the logits."""
    grad, logits, target, lse, count, ignore_index = args
    N, V = logits.shape
    _native.library.cross_entropy_backward(
        pointer(grad), pointer(logits), pointer(target.contiguous()), pointer(lse), pointer(count), pointer(outputs[0]),
        long(N), long(V), long(ignore_index),
    )  # fmt: skip
