"""Making a model with its published initialisation, and the loss it is trained on."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode

from .config import ModelConfig
from .gpt2 import GPT2
from .llama import Llama

KINDS = {"gpt2": GPT2, "llama": Llama}


class _Unfilled(TorchFunctionMode):
    """Skips what torch.nn.init does: on the meta device it fills nothing, but imports torch._dynamo (0.9 s) to do so."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if getattr(func, "__module__", None) == "torch.nn.init":
            return kwargs["tensor"] if kwargs and "tensor" in kwargs else args[0]
        return func(*args, **(kwargs or {}))


def build(config: ModelConfig, seed: int = 0) -> nn.Module:
    """The model with weights from N(0, 0.02), those that write to the residual stream scaled by 1/sqrt(2 n_layers)
    (GPT-2's initialisation), biases zero, norms one. Depends on `seed` only; the global generator isn't touched."""
    with torch.device("meta"), _Unfilled():
        model = KINDS[config.kind](config)
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, p in model.named_parameters():
        if p.dim() == 1:
            weights[name] = torch.full(p.shape, 1.0 if "norm" in name and name.endswith("weight") else 0.0)
        else:
            std = 0.02 / math.sqrt(2 * config.n_layers) if name.endswith("out.weight") else 0.02
            weights[name] = torch.empty(p.shape).normal_(0.0, std, generator=generator)
    model.load_state_dict(weights, assign=True)
    return model


def next_token_loss(logits_BTV: torch.Tensor, targets_BT: torch.Tensor) -> torch.Tensor:
    """Mean cross entropy in nats per token, of logits [B, T, V] against int64 targets [B, T]."""
    return F.cross_entropy(logits_BTV.flatten(0, 1), targets_BT.flatten())
