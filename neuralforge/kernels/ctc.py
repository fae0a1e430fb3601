"""Connectionist temporal classification by PyTorch's kernels, with the lengths as data: the shapes of the results don't depend on them.

PyTorch's operator hands backward a table as wide as the longest target is; here backward makes it again.
"""

from __future__ import annotations

import torch

aten = torch.ops.aten


@torch.library.custom_op("neuralforge::ctc_loss", mutates_args=())
def ctc_loss(
    log_probs: torch.Tensor, targets: torch.Tensor, input_lengths: torch.Tensor, target_lengths: torch.Tensor,
    blank: int = 0, zero_infinity: bool = False,
) -> torch.Tensor:  # fmt: skip
    """The losses [N] of `log_probs` [T, N, C] for `targets` [N, S], or one after another; with `zero_infinity` those that are
    infinite, of targets too long for their input, are 0."""
    losses = aten._ctc_loss.Tensor(log_probs, targets, input_lengths, target_lengths, blank, zero_infinity)[0]
    return torch.where(losses.isinf(), 0.0, losses) if zero_infinity else losses


@torch.library.custom_op("neuralforge::ctc_loss_backward", mutates_args=())
def ctc_loss_backward(
    g: torch.Tensor, log_probs: torch.Tensor, targets: torch.Tensor, input_lengths: torch.Tensor, target_lengths: torch.Tensor,
    blank: int = 0, zero_infinity: bool = False,
) -> torch.Tensor:  # fmt: skip
    """The gradient of `log_probs`, given that of the losses, `g` [N]. As PyTorch's, it takes it that they come from log_softmax."""
    given = log_probs, targets, input_lengths, target_lengths
    kept = aten._ctc_loss.Tensor(*given, blank, zero_infinity)
    return aten._ctc_loss_backward.Tensor(g, *given, *kept, blank, zero_infinity)


@ctc_loss.register_fake
def _(log_probs, targets, input_lengths, target_lengths, blank=0, zero_infinity=False):
    return log_probs.new_empty(log_probs.shape[1])


@ctc_loss_backward.register_fake
def _(g, log_probs, targets, input_lengths, target_lengths, blank=0, zero_infinity=False):
    return torch.empty_like(log_probs, memory_format=torch.contiguous_format)
