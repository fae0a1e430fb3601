"""The shape of a model."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

from ..errors import ConfigError

Kind = Literal["gpt2", "llama"]


@dataclass(frozen=True)
class ModelConfig:
    """A decoder-only transformer, complete: nothing is derived later.

    Raises ConfigError for sizes that don't fit together.
    """

    kind: Kind = "gpt2"
    vocab_size: int = 8192
    context: int = 256
    """The longest sequence, in tokens."""
    d_model: int = 384
    n_layers: int = 6
    n_heads: int = 6
    n_kv_heads: int = 6
    """Heads of keys and values; fewer than `n_heads` is grouped-query attention (llama only)."""
    d_ff: int = 1536
    """Width of the feed-forward layer."""
    dropout: float = 0.0
    tie_embeddings: bool = True
    """Use the token embedding as the output layer too."""
    norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    """Base of the rotary frequencies (llama only)."""

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise ConfigError(f"model.kind={self.kind!r}; expected one of {', '.join(get_args(Kind))}.")
        for name in ("vocab_size", "context", "d_model", "n_layers", "n_heads", "n_kv_heads", "d_ff"):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise ConfigError(f"model.{name}={value!r}; expected a whole number of at least 1.")
        if self.d_model % self.n_heads:
            raise ConfigError(
                f"model.d_model={self.d_model} doesn't divide by model.n_heads={self.n_heads}. Take "
                f"d_model={self.n_heads * max(1, round(self.d_model / self.n_heads))} or another number of heads."
            )
        if self.n_heads % self.n_kv_heads or (self.kind == "gpt2" and self.n_kv_heads != self.n_heads):
            raise ConfigError(
                f"model.n_kv_heads={self.n_kv_heads} with model.n_heads={self.n_heads}, kind {self.kind}; expected "
                f"{'the same number' if self.kind == 'gpt2' else 'a divisor of n_heads'}."
            )
        if self.kind == "llama" and self.d_head % 2:
            raise ConfigError(f"model.d_model/model.n_heads={self.d_head} is odd; rotary embeddings need an even size.")
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"model.dropout={self.dropout}; expected a number in [0, 1).")
        for name in ("norm_eps", "rope_theta"):
            if not 0 < getattr(self, name) < math.inf:
                raise ConfigError(f"model.{name}={getattr(self, name)}; expected a positive number.")

    @property
    def d_head(self) -> int:
        return self.d_model // self.n_heads

    def parameter_count(self) -> int:
        """Number of weights, tied ones once."""
        d, kv = self.d_model, self.n_kv_heads * self.d_head
        embeddings = self.vocab_size * d * (1 if self.tie_embeddings else 2)
        if self.kind == "gpt2":
            block = 4 * d * d + 4 * d + 2 * d * self.d_ff + self.d_ff + d + 4 * d
            return embeddings + self.context * d + self.n_layers * block + 2 * d
        block = 2 * d * d + 2 * d * kv + 3 * d * self.d_ff + 2 * d
        return embeddings + self.n_layers * block + d

    def flops_per_token(self, training: bool = True, context: int | None = None) -> int:
        """Floating-point operations of the matrix products for one token, a multiply and an add counted as two.

        Forward: 2 L (2 d^2 + 2 d kv + m d f + d (C + 1)) + 2 d V, for L layers of width d, with kv = n_kv_heads *
        d_head, m = 2 feed-forward matrices (llama 3) of width f, and V tokens in the vocabulary. d (C + 1) is causal
        attention, scores and weighted values, over `context` C tokens (default: the whole context): the token at
        position t sees t + 1, (C + 1) / 2 on average. Training is three times that: each product has two in the
        backward pass.
        """
        d, kv = self.d_model, self.n_kv_heads * self.d_head
        matrices = 2 * d * d + 2 * d * kv + (2 if self.kind == "gpt2" else 3) * d * self.d_ff
        attention = d * ((context or self.context) + 1)
        forward = 2 * (self.n_layers * (matrices + attention) + d * self.vocab_size)
        return forward * (3 if training else 1)
