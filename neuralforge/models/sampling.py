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

    `temperature` 0 takes the likeliest token; `top_k` samples among the k likeliest. Beyond the model's context the
    window slides: the model sees the last half-context to context tokens. `on_token` is called with each new column,
    int64 [B].
    """
    if tokens_BT.dim() != 2 or tokens_BT.shape[1] < 1:
        raise ConfigError(f"generate: tokens of shape {tuple(tokens_BT.shape)}; expected [batch, time] with time >= 1.")
    if temperature < 0 or (top_k is not None and top_k < 1):
        raise ConfigError(f"generate: temperature={temperature}, top_k={top_k}; expected >= 0 and >= 1.")
    training = model.training
    model.eval()
    try:
        context = model.config.context
        cache, fresh = KeyValueCache(), tokens_BT[:, -context:]
        for _ in range(max_new_tokens):
            if cache.length + fresh.shape[1] > context:  # start over from the later half of the window
                cache, fresh = KeyValueCache(), tokens_BT[:, -(context // 2 + 1) :]
            logits_BV = model(fresh, cache)[:, -1]
            fresh = _sample(logits_BV, temperature, top_k, generator)
            tokens_BT = torch.cat([tokens_BT, fresh], dim=1)
            if on_token is not None:
                on_token(fresh[:, 0])
        return tokens_BT
    finally:
        model.train(training)


def _sample(logits_BV: torch.Tensor, temperature: float, top_k: int | None, generator) -> torch.Tensor:
    if temperature == 0:
        return logits_BV.argmax(-1, keepdim=True)
    if top_k is not None and top_k < logits_BV.shape[-1]:
        kth = logits_BV.topk(top_k, dim=-1).values[:, -1:]
        logits_BV = logits_BV.masked_fill(logits_BV < kth, float("-inf"))
    return torch.multinomial((logits_BV / temperature).softmax(-1), 1, generator=generator)
