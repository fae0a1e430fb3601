"""The truth, in plain operators; any dtype. What is narrower than float32 is computed with in float32."""

from __future__ import annotations

import math

import torch

from ..native import wide
from .dropout import keep


def scores(q, k, is_causal, scale, window, mask, q_starts, k_starts):
    """q k^T scale, -inf where a query doesn't see a key; [B, H, T, S]."""
    s = (q @ per_query_head(k, q).transpose(-2, -1)) * (1 / math.sqrt(q.shape[-1]) if scale is None else scale)
    T, S = s.shape[-2:]
    (q_sequence, q_place), (k_sequence, k_place) = places(T, q_starts, q.device), places(S, k_starts, q.device)
    ahead = k_place - q_place.unsqueeze(1)
    if q_starts is not None:
        s = s.masked_fill(k_sequence != q_sequence.unsqueeze(1), -math.inf)
    if is_causal:
        s = s.masked_fill(ahead > 0, -math.inf)
    if window is not None:
        s = s.masked_fill(ahead.abs() >= window, -math.inf)
    if mask is not None:
        s = s.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else s + mask
    return s


def places(n, starts, device):
    """Of n tokens, the sequence that each is in and its place there."""
    token = torch.arange(n, device=device)
    sequence = 0 * token if starts is None else (token.unsqueeze(1) >= starts[1:]).sum(1)
    return sequence, token if starts is None else token - starts[sequence]


def softmax(s):
    """Weights and log-sum-exp; of a query that sees nothing 0 and -inf."""
    blind = (s == -math.inf).all(-1)
    s = s.masked_fill(blind.unsqueeze(-1), 0)
    return s.softmax(-1).masked_fill(blind.unsqueeze(-1), 0), s.logsumexp(-1).masked_fill(blind, -math.inf)


def reference(
    q, k, v, is_causal=False, scale=None, window=None, mask=None, dropout_p=0.0, seed=None, q_starts=None, k_starts=None
):
    dtype = q.dtype
    q, k, v = (x.to(wide(dtype)) for x in (q, k, v))
    p, lse = softmax(scores(q, k, is_causal, scale, window, mask, q_starts, k_starts))
    return ((p * keep(p, dropout_p, seed)) @ per_query_head(v, q)).to(dtype), lse


def reference_backward(
    g, q, k, v, out, lse,
    is_causal=False, scale=None, window=None, mask=None, dropout_p=0.0, seed=None, g_lse=None, q_starts=None, k_starts=None,
):  # fmt: skip
    # A function of g, q, k, v alone: `out` and `lse` are recomputed, so that they need no derivative of their own.
    dtype = q.dtype
    g, q, k, v = (x.to(wide(dtype)) for x in (g, q, k, v))
    p, _ = softmax(scores(q, k, is_causal, scale, window, mask, q_starts, k_starts))
    kept = keep(p, dropout_p, seed)
    dp = g @ per_query_head(v, q).transpose(-2, -1) * kept
    mean = (dp * p).sum(-1, keepdim=True)
    ds = p * (dp - (mean if g_lse is None else mean - g_lse.unsqueeze(-1)))
    ds = ds * (1 / math.sqrt(q.shape[-1]) if scale is None else scale)
    dk, dv = ds.transpose(-2, -1) @ q, (p * kept).transpose(-2, -1) @ g
    return tuple(x.to(dtype) for x in (ds @ per_query_head(k, q), per_group(dk, k), per_group(dv, v)))


def per_query_head(x, q):
    """Keys or values, repeated for each head of queries."""
    return x if x.shape[1] == q.shape[1] else x.repeat_interleave(q.shape[1] // x.shape[1], 1)


def per_group(d, like):
    return d if d.shape == like.shape else d.unflatten(1, (like.shape[1], d.shape[1] // like.shape[1])).sum(2)
