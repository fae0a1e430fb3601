"""Losses that PyTorch keeps as one operator, as compositions."""

from __future__ import annotations

import torch.nn.functional as F
import torch.nn.modules.linear_cross_entropy  # noqa: F401  (registers torch_nn::_linear_cross_entropy_*)

from ...errors import DifferentiationError
from ...graph.source import user_line
from .table import definition


@definition("torch_nn::_linear_cross_entropy_batch_chunked")
def linear_cross_entropy(
    x, linear_weight, target, linear_bias, weight, reduction, ignore_index, label_smoothing, batch_chunk_size,
    acc_policy, acc_dtype, allow_retain_graph, *compute_gradients,
):  # fmt: skip
    if any(compute_gradients):
        raise DifferentiationError(
            f"{user_line()}: F.linear_cross_entropy was called on tensors with requires_grad=True, and so computes "
            f"torch's gradients beside the loss. Pass detached tensors: nf.grad doesn't use requires_grad."
        )
    loss = F.cross_entropy(
        F.linear(x, linear_weight, linear_bias), target, weight,
        ignore_index=ignore_index, reduction=reduction, label_smoothing=label_smoothing,
    )  # fmt: skip
    return loss, x.new_empty(0, 0), x.new_empty(0, 0), x.new_empty(0)


@definition("torch_nn::_linear_cross_entropy_batch_chunked_no_reduction")
def linear_cross_entropy_rows(
    x, linear_weight, target, linear_bias, weight, ignore_index, batch_chunk_size, acc_policy, acc_dtype
):
    logits = F.linear(x, linear_weight, linear_bias)
    return F.cross_entropy(logits, target, weight, ignore_index=ignore_index, reduction="none")
