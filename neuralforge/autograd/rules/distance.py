"""Distances between rows, bags of embeddings, and losses over alignments."""

from __future__ import annotations

import torch

from ...kernels.ctc import ctc_loss_backward
from .reduction import norm_slope
from .table import Derivative, aten, definition, rule


@definition("_cdist_forward")
def cdist(a, b, p, compute_mode=None):
    return torch.linalg.vector_norm(a.unsqueeze(-2) - b.unsqueeze(-3), p, -1)


@rule("_cdist_forward", forward=False)
def cdist_rule(y, a, b, p, compute_mode=None):
    back = lambda g, a, b, y: aten._cdist_backward(g.contiguous(), a, b, p, y)
    return Derivative(lambda g: back(g, a, b, y)), Derivative(lambda g: back(g.mT, b, a, y.mT.contiguous()))


@definition("_cdist_backward")
def cdist_backward(g, a, b, p, y):
    between = a.unsqueeze(-2) - b.unsqueeze(-3)
    slope = norm_slope(torch.linalg.vector_norm(between, p, -1, keepdim=True), between, p, [-1])
    return (g.unsqueeze(-1) * slope).sum(-2)


@definition("_pdist_forward")
def pdist(x, p=2.0):
    i, j = torch.triu_indices(x.shape[0], x.shape[0], 1, device=x.device)
    return torch.linalg.vector_norm(x[i] - x[j], p, -1)


@definition("_embedding_bag", "_embedding_bag_forward_only")
def embedding_bag(
    weight, indices, offsets, scale_grad_by_freq=False, mode=0, sparse=False, per_sample_weights=None,
    include_last_offset=False, padding_idx=-1,
):  # fmt: skip
    """Each bag is indices[offsets[i] : offsets[i + 1]]; mode 0 sums its rows of `weight`, 1 averages, 2 takes maxima."""
    out = aten._embedding_bag_forward_only(
        weight.detach(), indices, offsets, scale_grad_by_freq, mode, sparse,
        None if per_sample_weights is None else per_sample_weights.detach(), include_last_offset, padding_idx,
    )  # fmt: skip
    bags = offsets.shape[0] - include_last_offset
    starts = offsets[:bags].contiguous()
    bag = torch.searchsorted(starts, torch.arange(indices.shape[0], device=indices.device), right=True) - 1
    counted = (indices != padding_idx).to(weight.dtype)
    size = counted.new_zeros(bags).index_add(0, bag, counted).unsqueeze(-1)
    if mode == 2:
        return aten.gather(weight, 0, out[3]) * (size > 0).to(weight.dtype), *out[1:]
    rows = aten.embedding(weight, indices, padding_idx, scale_grad_by_freq)
    share = counted if per_sample_weights is None else counted * per_sample_weights
    total = weight.new_zeros(bags, weight.shape[1]).index_add(0, bag, rows * share.unsqueeze(-1))
    return total / size.clamp(min=1) if mode == 1 else total, *out[1:]


@rule("_ctc_loss")
def ctc_loss(out, log_probs, targets, input_lengths, target_lengths, blank=0, zero_infinity=False):
    # As in PyTorch, the derivative takes it that log_probs come from log_softmax.
    slope = lambda g: aten._ctc_loss_backward(
        g, log_probs, targets, input_lengths, target_lengths, *out, blank, zero_infinity
    )
    pull = lambda gs: None if gs[0] is None else slope(gs[0])
    return Derivative(pull, lambda t: ((slope(torch.ones_like(out[0])) * t).sum((0, 2)), None))


@rule("neuralforge::ctc_loss")
def ctc_loss_of_any_lengths(losses, log_probs, *options):
    slope = lambda g: ctc_loss_backward(g, log_probs, *options)
    return Derivative(slope, lambda t: (slope(torch.ones_like(losses)) * t).sum((0, 2)))
