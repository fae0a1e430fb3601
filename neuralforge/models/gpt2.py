"""GPT-2 (Radford et al. 2019): learned positions, layer norms before each block, GELU, biases.

Shapes: B batch, T time, D model width, H heads, K head width, F feed-forward width, V vocabulary.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from .cache import KeyValueCache, attention
from .config import ModelConfig


class Attention(nn.Module):
    def __init__(self, c: ModelConfig, layer: int):
        super().__init__()
        self.layer, self.n_heads, self.dropout = layer, c.n_heads, c.dropout
        self.qkv = nn.Linear(c.d_model, 3 * c.d_model)
        self.out = nn.Linear(c.d_model, c.d_model)

    def forward(self, x_BTD: torch.Tensor, cache: KeyValueCache | None = None) -> torch.Tensor:
        B, T, D = x_BTD.shape
        q, k, v = (t.view(B, T, self.n_heads, -1).transpose(1, 2) for t in self.qkv(x_BTD).split(D, dim=-1))
        y_BHTK = attention(q, k, v, cache, self.layer, self.dropout if self.training else 0.0)
        return self.out(y_BHTK.transpose(1, 2).reshape(B, T, D))


class FeedForward(nn.Module):
    def __init__(self, c: ModelConfig):
        super().__init__()
        self.up = nn.Linear(c.d_model, c.d_ff)
        self.out = nn.Linear(c.d_ff, c.d_model)

    def forward(self, x_BTD: torch.Tensor) -> torch.Tensor:
        return self.out(F.gelu(self.up(x_BTD), approximate="tanh"))


class Block(nn.Module):
    def __init__(self, c: ModelConfig, layer: int):
        super().__init__()
        self.norm1, self.attention = nn.LayerNorm(c.d_model, eps=c.norm_eps), Attention(c, layer)
        self.norm2, self.feed_forward = nn.LayerNorm(c.d_model, eps=c.norm_eps), FeedForward(c)
        self.dropout = nn.Dropout(c.dropout)

    def forward(self, x_BTD: torch.Tensor, cache: KeyValueCache | None = None) -> torch.Tensor:
        x_BTD = x_BTD + self.dropout(self.attention(self.norm1(x_BTD), cache))
        return x_BTD + self.dropout(self.feed_forward(self.norm2(x_BTD)))


class GPT2(nn.Module):
    """`forward(tokens_BT: int64) -> logits_BTV`."""

    def __init__(self, c: ModelConfig):
        super().__init__()
        self.config = c
        self.tokens = nn.Embedding(c.vocab_size, c.d_model)
        self.positions = nn.Embedding(c.context, c.d_model)
        self.dropout = nn.Dropout(c.dropout)
        self.blocks = nn.ModuleList(Block(c, layer) for layer in range(c.n_layers))
        self.norm = nn.LayerNorm(c.d_model, eps=c.norm_eps)
        self.head = None if c.tie_embeddings else nn.Linear(c.d_model, c.vocab_size, bias=False)

    def forward(self, tokens_BT: torch.Tensor, cache: KeyValueCache | None = None) -> torch.Tensor:
        start, T = cache.length if cache else 0, tokens_BT.shape[1]
        positions_T = torch.arange(start, start + T, device=tokens_BT.device)
        x_BTD = self.dropout(self.tokens(tokens_BT) + self.positions(positions_T))
        for block in self.blocks:
            x_BTD = block(x_BTD, cache)
        if cache is not None:
            cache.length += T
        return F.linear(self.norm(x_BTD), (self.head or self.tokens).weight)
