"""What `step.py` trains: models, their data and losses, and the operations of a step."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

from neuralforge.models import ModelConfig, build, next_token_loss

Loss = Callable[..., torch.Tensor]


@dataclass(frozen=True)
class Task:
    """`loss(model, params, *data)`, where `params` are the weights by name, or None for the model's own."""

    describe: str
    model: Callable[[], nn.Module]
    data: Callable[[], tuple[torch.Tensor, ...]]
    loss: Loss
    flops: int
    """Of the matrix products of a whole step."""
    jax: Any
    """What `jax_step.make_loss` takes; None where it has no such model."""


def call(model: nn.Module, params: dict | None, *args: torch.Tensor) -> torch.Tensor:
    return model(*args) if params is None else functional_call(model, params, args)


def language(
    describe: str, config: ModelConfig, batch: int, loss: Loss, model: Callable[[ModelConfig], nn.Module] | None = None
) -> Task:
    def data() -> tuple[torch.Tensor, ...]:
        shape, generator = (batch, config.context + 1), torch.Generator().manual_seed(1)
        return (torch.randint(0, config.vocab_size, shape, generator=generator),)

    flops = config.flops_per_token() * batch * config.context
    make = model or (lambda config: build(config, 0))
    return Task(describe, lambda: make(config), data, loss, flops, None if model else config)


def next_token(model: nn.Module, params: dict | None, tokens: torch.Tensor) -> torch.Tensor:
    return next_token_loss(call(model, params, tokens[:, :-1]), tokens[:, 1:])


# ---- code that nobody tuned


def by_hand(model: nn.Module, params: dict | None, tokens: torch.Tensor) -> torch.Tensor:
    """The GPT in plain arithmetic: attention by matmul, mask and softmax, the loss by logsumexp and gather."""
    p = dict(model.named_parameters()) if params is None else params
    c = model.config
    x = p["tokens.weight"][tokens[:, :-1]]
    B, T, D = x.shape
    x = x + p["positions.weight"][:T]
    future = torch.ones(T, T, dtype=torch.bool).triu(1)

    def norm(x, name):
        mean = x.mean(-1, keepdim=True)
        variance = ((x - mean) ** 2).mean(-1, keepdim=True)
        return (x - mean) / torch.sqrt(variance + c.norm_eps) * p[f"{name}.weight"] + p[f"{name}.bias"]

    def linear(x, name):
        return x @ p[f"{name}.weight"].T + p[f"{name}.bias"]

    for i in range(c.n_layers):
        n = f"blocks.{i}"
        q, k, v = linear(norm(x, f"{n}.norm1"), f"{n}.attention.qkv").view(B, T, 3, c.n_heads, -1).permute(2, 0, 3, 1, 4)
        scores = (q @ k.transpose(-2, -1) / math.sqrt(c.d_head)).masked_fill(future, -math.inf)
        y = (torch.softmax(scores, -1) @ v).transpose(1, 2).reshape(B, T, D)
        x = x + linear(y, f"{n}.attention.out")
        up = linear(norm(x, f"{n}.norm2"), f"{n}.feed_forward.up")
        up = 0.5 * up * (1 + torch.tanh(math.sqrt(2 / math.pi) * (up + 0.044715 * up**3)))
        x = x + linear(up, f"{n}.feed_forward.out")
    logits = (norm(x, "norm") @ p["head.weight"].T).view(B * T, -1).float()
    picked = logits.gather(1, tokens[:, 1:].reshape(-1, 1)).squeeze(1)
    return (torch.logsumexp(logits, 1) - picked).mean()


# ---- PyTorch's own layers


class Layers(nn.Module):
    """A GPT of `nn.TransformerEncoderLayer`s. `forward(tokens: int64 [B, T]) -> logits [B, T, vocabulary]`."""

    def __init__(self, c: ModelConfig):
        super().__init__()
        layer = nn.TransformerEncoderLayer(c.d_model, c.n_heads, c.d_ff, 0.0, "gelu", batch_first=True, norm_first=True)
        self.tokens, self.positions = nn.Embedding(c.vocab_size, c.d_model), nn.Embedding(c.context, c.d_model)
        self.layers = nn.TransformerEncoder(layer, c.n_layers, nn.LayerNorm(c.d_model), enable_nested_tensor=False)
        self.head = nn.Linear(c.d_model, c.vocab_size, bias=False)
        self.register_buffer("future", nn.Transformer.generate_square_subsequent_mask(c.context))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.tokens(tokens) + self.positions.weight[: tokens.shape[1]]
        return self.head(self.layers(x, self.future, is_causal=True))


def layers(config: ModelConfig) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Layers(config)


# ---- mostly matrix products


@dataclass(frozen=True)
class MLPConfig:
    kind: str = "mlp"
    d_in: int = 784
    d_model: int = 768
    d_ff: int = 3072
    n_layers: int = 6
    classes: int = 1000
    norm_eps: float = 1e-5


class MLP(nn.Module):
    """`forward(x: float32 [N, d_in]) -> logits [N, classes]`: residual blocks of layer norm, linear, GELU, linear."""

    def __init__(self, c: MLPConfig):
        super().__init__()
        self.enter = nn.Linear(c.d_in, c.d_model)
        self.norms = nn.ModuleList(nn.LayerNorm(c.d_model, eps=c.norm_eps) for _ in range(c.n_layers))
        self.ups = nn.ModuleList(nn.Linear(c.d_model, c.d_ff) for _ in range(c.n_layers))
        self.downs = nn.ModuleList(nn.Linear(c.d_ff, c.d_model) for _ in range(c.n_layers))
        self.head = nn.Linear(c.d_model, c.classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.enter(x)
        for norm, up, down in zip(self.norms, self.ups, self.downs):
            x = x + down(F.gelu(up(norm(x))))
        return self.head(x)


def mlp(describe: str, c: MLPConfig, batch: int) -> Task:
    def model() -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return MLP(c)

    def data() -> tuple[torch.Tensor, ...]:
        generator = torch.Generator().manual_seed(1)
        x = torch.empty(batch, c.d_in).normal_(generator=generator)
        return x, torch.randint(0, c.classes, (batch,), generator=generator)

    def loss(model: nn.Module, params: dict | None, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(call(model, params, x), y)

    matrices = c.d_in * c.d_model + c.n_layers * 2 * c.d_model * c.d_ff + c.d_model * c.classes
    return Task(describe, model, data, loss, (6 * matrices - 2 * c.d_in * c.d_model) * batch, c)


GPT = ModelConfig("gpt2", 8192, 256, 384, 6, 6, 6, 1536, tie_embeddings=False)
LLAMA = ModelConfig("llama", 8192, 256, 640, 8, 10, 5, 1728, tie_embeddings=False)

TASKS = {
    "gpt": language("GPT, 17 M parameters", GPT, 8, next_token),
    "llama": language("Llama, 50 M: RMS norm, rotary, SwiGLU, grouped queries", LLAMA, 4, next_token),
    "mlp": mlp("residual MLP, 30 M", MLPConfig(), 1024),
    "wild": language("GPT, 17 M, in plain arithmetic", GPT, 8, by_hand),
    "layers": language("GPT, 17 M, of nn.TransformerEncoderLayer", GPT, 8, next_token, layers),
}
