"""Sampling from a model, with a cache of keys and values so that each new token costs one position."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from ..errors import ConfigError
from .cache import KeyValueCache


@torch.no_grad()
def generate(
    model: nn.Module,
    tokens_BT: torch.Tensor,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    generator: torch.Generator | None = None,
    on_token: Callable[[torch.Tensor], None] | None = None,
) -> torch.Tensor:
    """Continue each row of `tokens_BT` (int64, T >= 1) by `max_new_tokens`; returns int64 [B, T + max_new_tokens].

    `temperature` 0 takes the likeliest token; `top_k` samples among the k likeliest. `on_token` is called with each
    new column, int64 [B]. Past the model's context the window slides by half a context at a time: a token depends on
    between half and all of the context before it, and costs about two positions instead of a whole window (which is
    what sliding by one would need, as every position's keys and values change). Raises ConfigError for arguments out
    of range.
    """
    if tokens_BT.dim() != 2 or tokens_BT.shape[1] < 1:
        raise ConfigError(f"generate: tokens of shape {tuple(tokens_BT.shape)}; expected [batch, time] with time >= 1.")
    if not temperature >= 0 or (top_k is not None and top_k < 1) or max_new_tokens < 0:
        raise ConfigError(
            f"generate: temperature={temperature}, top_k={top_k}, max_new_tokens={max_new_tokens}; expected a "
            f"temperature of at least 0, a top_k of at least 1, and no negative number of tokens."
        )
    training = model.training
    model.eval()
    try:
        context = model.config.context
        cache, fresh = KeyValueCache(context), tokens_BT[:, -context:]
        for _ in range(max_new_tokens):
            if cache.length + fresh.shape[1] > context:  # start over from the later half of the window
                cache, fresh = KeyValueCache(context), tokens_BT[:, -(context // 2 + 1) :]
            logits_BV = model(fresh, cache)[:, -1]
            fresh = _sample(logits_BV, temperature, top_k, generator)
            tokens_BT = torch.cat([tokens_BT, fresh], dim=1)
            if on_token is not None:
                on_token(fresh[:, 0])
        return tokens_BT
    finally:
        model.train(training)


def _sample(
    logits_BV: torch.Tensor, temperature: float, top_k: int | None, generator: torch.Generator | None
) -> torch.Tensor:
    """One token a row, int64 [B, 1]."""
    if temperature == 0:
        return logits_BV.argmax(-1, keepdim=True)
    best, tokens = logits_BV.float().topk(min(top_k or logits_BV.shape[-1], logits_BV.shape[-1]), dim=-1)
    # Subtract the largest before dividing: a tiny temperature must not overflow.
    chosen = torch.multinomial(((best - best[:, :1]) / temperature).softmax(-1), 1, generator=generator)
    return tokens.gather(-1, chosen)
