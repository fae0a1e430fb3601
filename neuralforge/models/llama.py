"""Llama (Touvron et al. 2023, https://arxiv.org/abs/2302.13971): RMS norm, rotary positions, SwiGLU, grouped queries.

Shapes: B batch, T time, D model width, H query heads, G key/value heads, K head width, V vocabulary.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from .cache import KeyValueCache, attention
from .config import ModelConfig

Rope = tuple[torch.Tensor, torch.Tensor]


def rotary(start: int, T: int, K: int, theta: float, device: torch.device) -> Rope:
    """Cosines and sines of the rotations of T positions from `start`, each float64 [T, K] (Su et al. 2021,
    https://arxiv.org/abs/2104.09864). In float64, for in float32 the angle at position 100 000 is off by 0.004."""
    frequency = theta ** (-torch.arange(0, K, 2, dtype=torch.float64, device=device) / K)
    angle = torch.outer(torch.arange(start, start + T, dtype=torch.float64, device=device), frequency).repeat(1, 2)
    return angle.cos(), angle.sin()


def rotate(x_BHTK: torch.Tensor, cos_TK: torch.Tensor, sin_TK: torch.Tensor) -> torch.Tensor:
    a, b = x_BHTK.chunk(2, dim=-1)
    return x_BHTK * cos_TK + torch.cat([-b, a], dim=-1) * sin_TK


class Attention(nn.Module):
    def __init__(self, c: ModelConfig, layer: int):
        super().__init__()
        self.layer, self.d_head, self.dropout = layer, c.d_head, c.dropout
        self.q = nn.Linear(c.d_model, c.n_heads * c.d_head, bias=False)
        self.k = nn.Linear(c.d_model, c.n_kv_heads * c.d_head, bias=False)
        self.v = nn.Linear(c.d_model, c.n_kv_heads * c.d_head, bias=False)
        self.out = nn.Linear(c.n_heads * c.d_head, c.d_model, bias=False)

    def forward(self, x_BTD: torch.Tensor, rope: Rope, cache: KeyValueCache | None = None) -> torch.Tensor:
        B, T, _ = x_BTD.shape
        q, k, v = (p(x_BTD).view(B, T, -1, self.d_head).transpose(1, 2) for p in (self.q, self.k, self.v))
        dropout = self.dropout if self.training else 0.0
        y_BHTK = attention(rotate(q, *rope), rotate(k, *rope), v, cache, self.layer, dropout)
        return self.out(y_BHTK.transpose(1, 2).reshape(B, T, -1))


class FeedForward(nn.Module):
    def __init__(self, c: ModelConfig):
        super().__init__()
        self.gate = nn.Linear(c.d_model, c.d_ff, bias=False)
        self.up = nn.Linear(c.d_model, c.d_ff, bias=False)
        self.out = nn.Linear(c.d_ff, c.d_model, bias=False)

    def forward(self, x_BTD: torch.Tensor) -> torch.Tensor:
        return self.out(F.silu(self.gate(x_BTD)) * self.up(x_BTD))


class Block(nn.Module):
    def __init__(self, c: ModelConfig, layer: int):
        super().__init__()
        self.norm1, self.attention = nn.RMSNorm(c.d_model, eps=c.norm_eps), Attention(c, layer)
        self.norm2, self.feed_forward = nn.RMSNorm(c.d_model, eps=c.norm_eps), FeedForward(c)
        self.dropout = nn.Dropout(c.dropout)

    def forward(self, x_BTD: torch.Tensor, rope: Rope, cache: KeyValueCache | None = None) -> torch.Tensor:
        x_BTD = x_BTD + self.dropout(self.attention(self.norm1(x_BTD), rope, cache))
        return x_BTD + self.dropout(self.feed_forward(self.norm2(x_BTD)))


class Llama(nn.Module):
    """`forward(tokens_BT: int64) -> logits_BTV`."""

    def __init__(self, c: ModelConfig):
        super().__init__()
        self.config = c
        self.tokens = nn.Embedding(c.vocab_size, c.d_model)
        self.blocks = nn.ModuleList(Block(c, layer) for layer in range(c.n_layers))
        self.norm = nn.RMSNorm(c.d_model, eps=c.norm_eps)
        self.head = None if c.tie_embeddings else nn.Linear(c.d_model, c.vocab_size, bias=False)

    def forward(self, tokens_BT: torch.Tensor, cache: KeyValueCache | None = None) -> torch.Tensor:
        x_BTD = self.tokens(tokens_BT)
        T = tokens_BT.shape[1]
        cos, sin = rotary(cache.length if cache else 0, T, self.config.d_head, self.config.rope_theta, tokens_BT.device)
        rope = cos.to(x_BTD.dtype), sin.to(x_BTD.dtype)
        for block in self.blocks:
            x_BTD = block(x_BTD, rope, cache)
        if cache is not None:
            cache.length += T
        return F.linear(self.norm(x_BTD), (self.head or self.tokens).weight)
